"""`Method`: what a training loop must know about one method, and the functions that make it for each method.

| method | layer | loss term | before the step | optimizer | after the step |
|---|---|---|---|---|---|
| LoRA | LoRALinear | (frd_penalty) | | AdamW | |
| AdaLoRA | SVDLinear | svd_penalty | | AdamW | RankAllocator |
| SoRA | GatedLinear | gate_l1 | | SparseAdamW, a threshold on the gates | |
| RM-LoRA | LoRALinear | svd_penalty | RandomMask | AdamW | |

The functions below return a `Method`; all but `full_fine_tuning` adapt the model. A training loop calls it
at these places:

    method = rm_lora(model, ["query", "value"], r=8, lora_alpha=16, random_rank=4)
    optimizer = method.optimizer(lr=1e-3)
    method.begin(steps)
    for step, batch in enumerate(batches):
        (loss_of(model, batch) + method.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()

`loralib.training.method_callback` calls it from the hooks of the stock Trainer.
"""

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loralib.adapt import Factors, adapt, factors, is_lora
from loralib.allocator import RankAllocator
from loralib.calls import Calls, nothing
from loralib.errors import InputError, check_at_least
from loralib.layers import GatedLinear, LoRALinear, SVDLinear
from loralib.masking import RandomMask
from loralib.regularizer import frd_penalty, svd_penalty
from loralib.sparse import SparseAdamW, gate_l1

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """A piece of a method, such as an allocator, whose state belongs in a checkpoint."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None: ...

    def restart(self) -> None: ...


@dataclass
class Method(Calls):
    """What a training loop must know about one method. By default every hook does nothing, and the optimizer is AdamW.

    Attributes:
        name: the name in logs, records and reports.
        model: the adapted model; None if the method was given only factors.
        factors: the matrices that the method works on; None for full fine-tuning.
        penalty: returns the loss term without its weight, a scalar.
        penalty_coef: weight of the loss term; with 0 it is not computed (ledger L7).
        penalty_name: name under which the loss term is logged, without its weight.
        begin: begin(total_steps) is called before the first step, and again if the number of optimizer steps changes
            (auto_find_batch_size) or is checked before training, so a second call must do no harm. It raises InputError
            if the method's schedule does not fit into this number of steps.
        before_step: before_step(step, epoch=None, measure=False) is called after clipping and before the optimizer's
            step `step` (0 for the first) of epoch `epoch`. `measure` is True if this step is logged by its number, so
            that `scalars` may report on it; a log at the end of an epoch is not foreseen.
        after_step: after_step(step, gradients_valid=True) is called right after the optimizer's step, while the
            gradients are still there. `gradients_valid` is False if a gradient scaler skipped the step.
        optimizer_class: the class of the method's optimizer. A trainer that would choose another one is refused, or
            makes this one, if it is not AdamW or if there are `own_groups`.
        own_groups: parameter groups with settings of their own (SoRA's gates).
        state: the pieces whose state a checkpoint keeps, by name.
        scalars: returns numbers to log, by their names in TensorBoard. It synchronises with the GPU.
        log_every: number of optimizer steps from one such log to the next; None: they are logged with the loss.
        complaint: returns a sentence if every rank or gate is 0, so that the adapter adds nothing, otherwise None. It
            synchronises with the GPU, and so does `facts`.
        facts: returns what the record of a finished run says about the method.
        plan: plan(total_steps) returns a sentence about what the method will do in a run; "" for none.
    """

    name: str
    model: nn.Module | None = None
    factors: Factors | None = None
    penalty: Callable[[], Tensor] | None = None
    penalty_coef: float = 0.0
    penalty_name: str = "penalty"
    begin: Callable[[int], None] = nothing
    before_step: Callable[..., Any] = nothing
    after_step: Callable[..., Any] = nothing
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
    own_groups: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Stateful] = field(default_factory=dict)
    scalars: Callable[[], dict[str, float]] = dict
    log_every: int | None = None
    complaint: Callable[[], str | None] = nothing
    facts: Callable[[], dict[str, Any]] = dict
    plan: Callable[[int], str] = lambda total_steps: ""

    @property
    def needs_optimizer(self) -> bool:
        """Whether a trainer must use the method's own optimizer; otherwise any optimizer will do."""
        return self.optimizer_class is not torch.optim.AdamW or bool(self.own_groups)

    def loss(self) -> Tensor | float:
        """The weighted loss term, a scalar to add to the task's loss; 0.0 if the method has none.

        With gradient accumulation, add it to the loss of each micro-batch before you divide that loss.
        """
        return self.penalty_coef * self.penalty() if self.penalty is not None and self.penalty_coef else 0.0

    def optimizer(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decayed: Container[str] | None = None,
    ) -> Any:
        """Make the method's optimizer, for all parameters of the model that train.

        Args:
            lr, betas, eps, weight_decay: as for torch's AdamW; the method's own groups may override them (ledger S3).
            decayed: names of the parameters that decay; None: all of two dimensions or more.

        Raises:
            InputError: the method has factors and no model, so it does not know which parameters train. Later, at a
                step of the optimizer: the loop has left out a call that the method needs.
        """
        if self.model is None:
            raise InputError(
                f"{self.name} was made from factors without a model, so it cannot list the model's parameters: make "
                "the optimizer yourself."
            )
        own = {id(p) for group in self.own_groups for p in group["params"]}
        rest = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in own]
        decay = [p.dim() > 1 if decayed is None else n in decayed for n, p in rest]
        groups = [
            {"params": [p for (_, p), d in zip(rest, decay, strict=True) if d], "weight_decay": weight_decay},
            {"params": [p for (_, p), d in zip(rest, decay, strict=True) if not d], "weight_decay": 0.0},
        ]
        make: Any = self.optimizer_class
        made = make([*groups, *self.own_groups], lr=lr, betas=betas, eps=eps)
        made.register_step_pre_hook(self.check_calls)
        return made


def full_fine_tuning(model: nn.Module) -> Method:
    """Full fine-tuning: every parameter trains, and no layer is adapted."""
    return Method("full", model)


def lora(
    model: nn.Module | Factors,
    modules: Sequence[str] | None = None,
    *,
    reg_orth_coef: float = 0.0,
    triplets: bool = False,
    **settings: Any,
) -> Method:
    """LoRA (arXiv 2106.09685), with an optional orthogonality penalty.

    Args:
        model: the model to adapt. Without `modules`: a model that `adapt` or Hugging Face PEFT has adapted already, or
            its `Factors`.
        modules: the layers to adapt, see `adapt.match_modules`.
        reg_orth_coef: weight of the penalty. It is the mean absolute cosine between directions (ledger L6); with
            `triplets` it is that on A A^T - I and B^T B - I (ledger L5).
        triplets: use AdaLoRA's layer, and keep all its singular values.
        settings: arguments of the layer: r, lora_alpha, lora_dropout, init_std.

    Raises:
        InputError: see `adapt` and `adapt.factors`; or `settings` are given for a model that is adapted already.
    """
    of = _factors(model, SVDLinear if triplets else LoRALinear, modules, settings, reg_orth_coef)
    return Method(
        "svd-lora" if triplets else "lora",
        model if isinstance(model, nn.Module) else None,
        of,
        penalty=lambda: (svd_penalty if triplets else frd_penalty)(of.A, of.B),
        penalty_coef=reg_orth_coef,
        penalty_name="orth_regu_loss",
    )


def adalora(
    model: nn.Module | Factors,
    modules: Sequence[str] | None = None,
    *,
    target_rank: int | None = None,
    target_total_rank: int | None = None,
    init_warmup: float = 0,
    final_warmup: float = 0,
    mask_interval: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    reg_orth_coef: float = 0.0,
    log_every: int | None = None,
    **settings: Any,
) -> Method:
    """AdaLoRA (arXiv 2303.10512): singular values within a budget that falls while training.

    Args:
        model, modules, settings: as `lora`. The layers are `SVDLinear`; factors need E (r, 1) between them.
        target_rank, target_total_rank, init_warmup, final_warmup, mask_interval, beta1, beta2: see `RankAllocator`.
        reg_orth_coef: weight of the penalty on A A^T - I and B^T B - I (ledger L5).
        log_every: steps from one log of budget and ranks to the next; None: they are logged with the loss.

    Raises:
        InputError: as `lora`; or the budget or the schedule is impossible (ledger A6).
    """
    of = _factors(model, SVDLinear, modules, settings, reg_orth_coef)
    allocator = RankAllocator(
        of,
        target_rank=target_rank,
        target_total_rank=target_total_rank,
        init_warmup=init_warmup,
        final_warmup=final_warmup,
        mask_interval=mask_interval,
        beta1=beta1,
        beta2=beta2,
    )

    def scalars() -> dict[str, float]:
        values: dict[str, float] = {"Budget/total_rank": allocator.budget}
        values["Budget/sum_param"] = allocator.remaining_parameters()
        if allocator.threshold is not None:
            values["Budget/mask_threshold"] = allocator.threshold.item()
        values["Budget/nonzero_rank"] = sum(of.ranks().values())
        return values | {f"Ranknum/{name}": rank for name, rank in allocator.kept_ranks().items()}

    def complaint() -> str | None:
        if allocator.threshold is None or any(of.ranks().values()):
            return None
        return (
            "the rank of every matrix is 0, so the adapter adds nothing: all triplets score the same; look at the "
            "learning rate and the gradients"
        )

    def facts() -> dict[str, Any]:
        ranks = of.ranks()
        return {"ranks": ranks, "total_rank": sum(ranks.values()), "target_total_rank": allocator.target_total}

    return Method(
        "adalora",
        model if isinstance(model, nn.Module) else None,
        of,
        penalty=lambda: svd_penalty(of.A, of.B),
        penalty_coef=reg_orth_coef,
        penalty_name="orth_regu_loss",
        begin=allocator.begin,
        after_step=allocator.step,
        state={"allocator": allocator},
        scalars=scalars,
        log_every=log_every,
        complaint=complaint,
        facts=facts,
        plan=lambda total: (
            f"budget: {allocator.total_rank} singular values until step {allocator.init_warmup}, then falling to "
            f"{allocator.target_total} at step {total - allocator.final_warmup} of {total}"
        ),
    )


def sora(
    model: nn.Module | Factors,
    modules: Sequence[str] | None = None,
    *,
    threshold: float,
    sparse_lambda: float = 0.0,
    sparse_lr: float | None = None,
    as_released: bool = False,
    **settings: Any,
) -> Method:
    """SoRA (arXiv 2311.11696): gates between the factors; the optimizer sets many of them to 0.

    Args:
        model, modules, settings: as `lora`. The layers are `GatedLinear`; factors need gates between them.
        threshold: by how much the proximal step after each optimizer step shrinks the gates (flag `sparse_lambda_2`;
            eta lambda of eq. 7).
        sparse_lambda: weight of the gates' L1 norm in the loss (lambda of eq. 5; ledger S2).
        sparse_lr: learning rate of the gates; None: that of the other parameters (ledger S3).
        as_released: shrink the gates as the released code does (ledger S1).

    Raises:
        InputError: as `lora`; or the model has no gates, or a number is negative.
    """
    check_at_least(0, threshold=threshold, sparse_lambda=sparse_lambda)
    of = _factors(model, GatedLinear, modules, settings)
    if not of.between or any(gate.shape[0] != 1 for gate in of.between):
        raise InputError(
            "SoRA needs gates between the factors (layers GatedLinear, with gates of shape (1, r)), and PEFT's layers "
            "have none: give a plain model and the modules to adapt."
        )
    gates = {"params": of.between, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    if sparse_lr is not None:
        gates["lr"] = sparse_lr
    sizes = [a.shape[1] + b.shape[0] for a, b in zip(of.A, of.B, strict=True)]

    def remaining() -> int:
        """Kept factor elements: in + out for each gate that is not 0."""
        return sum(rank * size for rank, size in zip(of.ranks().values(), sizes, strict=True))

    def scalars() -> dict[str, float]:
        share = sum(of.ranks().values()) / sum(gate.numel() for gate in of.between)
        return {"Gates/nonzero_share": share, "Gates/remaining_parameters": remaining()}

    def complaint() -> str | None:
        if any(of.ranks().values()):
            return None
        return f"every gate is 0, so the adapter adds nothing: lower sparse_lambda_2 (here {threshold:g})"

    return Method(
        "sora",
        model if isinstance(model, nn.Module) else None,
        of,
        penalty=lambda: gate_l1(of.between),
        penalty_coef=sparse_lambda,
        penalty_name="gate_l1",
        optimizer_class=SparseAdamW,
        own_groups=[gates | {"threshold": threshold, "as_released": as_released}],
        scalars=scalars,
        complaint=complaint,
        facts=lambda: {"lambda": threshold, "gates": of.ranks(), "remaining": remaining()},
        plan=lambda total: f"gates: threshold {threshold:.4g} after each step, L1 weight {sparse_lambda}",
    )


def rm_lora(
    model: nn.Module | Factors,
    modules: Sequence[str] | None = None,
    *,
    random_rank: int,
    version: str = "v1",
    reg_orth_coef: float = 0.0,
    mask_resample: str = "step",
    seed: int = 0,
    as_released: bool = False,
    **settings: Any,
) -> Method:
    """RM-LoRA (arXiv 2407.12074): in each step only some directions, drawn at random, receive a gradient.

    Args:
        model, modules, settings: as `lora`.
        random_rank: number of directions of each matrix that receive a gradient, 1 to r.
        version: "v1" makes one draw for the rows of A and the columns of B, "v2" one draw for each (ledger R4).
        reg_orth_coef: weight of the penalty on A A^T - I and B^T B - I (ledger R7).
        mask_resample: "step" draws again at each optimizer step, "epoch" at each epoch (ledger R3); then `before_step`
            needs epoch, the number of completed epochs.
        seed: seed of the draws (ledger R5).
        as_released: do not mask the first step; from the second on, also set the gradients of all other parameters,
            such as those of the head, to 0 (ledger R1, R2); needs the model.

    Raises:
        InputError: as `lora`; or a value lies outside its range.
    """
    of = _factors(model, LoRALinear, modules, settings, reg_orth_coef)
    mask = RandomMask(of, random_rank, version, seed)
    if mask_resample not in ("step", "epoch"):
        raise InputError(f"mask_resample must be step or epoch; it is {mask_resample!r}.")
    if as_released and not isinstance(model, nn.Module):
        raise InputError("as_released also masks the parameters that are not factors: give the model, not its factors.")
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    own = {id(p) for p in (*of.A, *of.B, *of.between)}
    others = [p for n, p in named if p.requires_grad and not is_lora(n) and id(p) not in own]
    norms: dict[str, Tensor] = {}  # on the device until they are logged

    def before_step(step: int, epoch: int | None = None, measure: bool = False) -> None:
        key = step if mask_resample == "step" else epoch
        if key is None:
            raise InputError(
                "mask_resample is epoch, and before_step got no epoch, so one draw would serve the whole training: "
                "call before_step(step, epoch=number of completed epochs)."
            )
        if as_released and step == 0:
            return
        if measure:
            norms["train/grad_norm_before_mask"] = mask.gradient_norm()
        mask.apply(key)
        if as_released:
            gradients: list[Any] = [p.grad for p in others if p.grad is not None]
            torch._foreach_zero_(gradients)
        if measure:
            norms["train/grad_norm_after_mask"] = mask.gradient_norm()

    def scalars() -> dict[str, float]:
        values = {name: norm.item() for name, norm in norms.items()}
        norms.clear()
        return values

    sides = len(of.names) * (1 if version == "v1" else 2)
    return Method(
        f"rm-lora-{version}",
        model if isinstance(model, nn.Module) else None,
        of,
        penalty=lambda: svd_penalty(of.A, of.B),
        penalty_coef=reg_orth_coef,
        penalty_name="orth_regu_loss",
        before_step=before_step,
        scalars=scalars,
        facts=lambda: {"random_rank": random_rank, "directions_per_step": random_rank * sides},
        plan=lambda total: (
            f"mask: {random_rank} of {mask.r} directions per matrix, drawn again at each {mask_resample}"
        ),
    )


def _factors(
    model: nn.Module | Factors,
    layer: type[LoRALinear],
    modules: Sequence[str] | None,
    settings: Mapping[str, Any],
    penalty_coef: float = 0.0,
) -> Factors:
    """Adapt the model if `modules` are given, and find its factors.

    Raises:
        InputError: `modules` for `Factors`; `settings` without `modules`; or a penalty for a model that has
            one in its own loss.
    """
    check_at_least(0, reg_orth_coef=penalty_coef)
    if modules is not None:
        if isinstance(model, Factors):
            raise InputError("factors are adapted already: leave out the modules to adapt.")
        adapt(model, layer, modules, **settings)
    elif settings:
        raise InputError(f"{', '.join(settings)} are settings of new layers: name the modules to adapt, too.")
    of = factors(model)
    if of.penalised and penalty_coef:
        raise InputError(
            f"reg_orth_coef is {penalty_coef:g}, but PEFT's AdaLoRA adds an orthogonality penalty of its own to the "
            "loss: leave it at 0 and set orth_reg_weight in AdaLoraConfig."
        )
    if of.A and (dtype := of.A[0].dtype) in (torch.float16, torch.bfloat16):
        logger.warning(
            "the factors are %s, as the model is: small steps of an optimizer round to nothing; load the model with "
            "dtype=torch.float32, and save time and memory by autocast (--bf16)",
            dtype,
        )
    return of
