"""SoRA (arXiv 2311.11696): soft threshold, L1 term of the gates, and the optimizer that applies them."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from loralib.errors import InputError


def gate_l1(gates: Sequence[Tensor]) -> Tensor:
    """Sum of |gate| over the number of gate elements of all matrices (ledger S2). A scalar, float32 or better."""
    stacked = torch.cat([g.view(-1) for g in gates])
    return (stacked.float() if stacked.dtype in (torch.float16, torch.bfloat16) else stacked).abs().mean()


def soft_threshold_(values: Sequence[Tensor], threshold: float) -> None:
    """sign(p) max(|p| - threshold, 0), in place (paper eq. 7, ledger S1)."""
    magnitudes = torch._foreach_abs(list(values))
    torch._foreach_sub_(magnitudes, threshold)
    torch._foreach_clamp_min_(magnitudes, 0.0)
    signs = torch._foreach_sign(list(values))
    torch._foreach_mul_(signs, magnitudes)
    torch._foreach_copy_(list(values), signs)


def released_threshold_(values: Sequence[Tensor], threshold: float) -> None:
    """Shrink as the released code does, by three assignments one after the other (ledger S1).

    Because of their order, values with threshold < |p| < 2 threshold become 0 as well.
    """
    for p in values:
        p.copy_(torch.where(p > threshold, p - threshold, p))
        p.copy_(torch.where(p < -threshold, p + threshold, p))
        p.masked_fill_(p.abs() < threshold, 0.0)


class SparseAdamW(torch.optim.Optimizer):
    """AdamW as SoRA runs it, with a proximal step on the groups that have a `threshold`.

    A step is p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), then p -= lr weight_decay p, then p is shrunk by
    the threshold, which is not multiplied by the learning rate (ledger S1, S3, S4). torch's AdamW adds eps after the
    bias correction, and decays first.

    Groups and saved states of earlier versions call the threshold `sparse_lambda`; it is renamed when they are loaded.

    Args:
        params: parameters or groups; a group may set lr, betas, eps, weight_decay, threshold, as_released.
        lr: learning rate.
        betas: decay of the averages.
        eps: added to sqrt(v).
        weight_decay: decoupled decay.
        threshold: by how much the proximal step shrinks (flag `sparse_lambda_2`); 0: there is no such step.
        as_released: shrink with `released_threshold_` instead of `soft_threshold_`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        threshold: float = 0.0,
        as_released: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "threshold": threshold,
            "as_released": as_released,
            "step": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(_with_threshold(param_group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [_with_threshold(group) for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all groups. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            gradients = [p.grad for p in parameters]
            averages = [self.state[p]["exp_avg"] for p in parameters]
            squares = [self.state[p]["exp_avg_sq"] for p in parameters]
            beta1, beta2 = group["betas"]
            group["step"] += 1
            correction = math.sqrt(1 - beta2 ** group["step"]) / (1 - beta1 ** group["step"])
            torch._foreach_lerp_(averages, gradients, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            denominators = torch._foreach_sqrt(squares)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(parameters, averages, denominators, -group["lr"] * correction)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["threshold"]:
                shrink = released_threshold_ if group["as_released"] else soft_threshold_
                shrink(parameters, group["threshold"])
        return loss


def _with_threshold(group: dict[str, Any]) -> dict[str, Any]:
    """The parameter group, with the earlier name of the threshold replaced by today's."""
    return {"threshold" if key == "sparse_lambda" else key: value for key, value in group.items()}


def lambda_stages(schedule: str, start: float, end: float, stages: int) -> list[float]:
    """Thresholds of SoRA's sparsifying schedule, first to last (paper's Algorithm 1, ledger S8).

    Args:
        schedule: "linear": the thresholds are evenly spaced; "log_linear": their exp is; "exp_linear": their log is.
        start: `sparse_lambda_2`; above 0 for "exp_linear".
        end: `max_lambda`, above start.
        stages: `lambda_num`, 2 or more, the first stage included.

    Raises:
        InputError: a value outside its range.
    """
    if stages < 2:
        raise InputError(f"lambda_num is {stages}: a schedule needs 2 or more stages.")
    if end <= start:
        raise InputError(f"max_lambda must be above sparse_lambda_2 = {start}, where the schedule starts; it is {end}.")
    if schedule == "exp_linear" and start <= 0:
        raise InputError(
            f"lambda_schedule exp_linear cannot start at sparse_lambda_2 = {start}, since log 0 does not exist: start "
            "above 0, or choose linear or log_linear."
        )
    functions: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
        "linear": (float, float),
        "log_linear": (math.exp, math.log),
        "exp_linear": (math.log, math.exp),
    }
    if schedule not in functions:
        raise InputError(f"lambda_schedule must be one of {', '.join(functions)}; it is {schedule!r}.")
    there, back = functions[schedule]
    try:
        a, b = there(start), there(end)
    except OverflowError as error:
        raise InputError(f"max_lambda is {end}, whose exponential has no end: thresholds lie well below 1.") from error
    return [start, *(back(a + (b - a) * i / (stages - 1)) for i in range(1, stages - 1)), end]
