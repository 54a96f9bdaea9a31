"""AdaLoRA's rank allocator (arXiv 2303.10512, section 3.2 and 3.3; ledger A1 to A8): importance, budget, mask."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapt import Factors, factors
from loralib.errors import InputError, check_at_least

logger = logging.getLogger(__name__)


class RankAllocator:
    """Keeps the most important singular values of all matrices within a budget that falls to a target.

    A triplet is one singular value E_i with row i of A and column i of B. Call `step` right after each optimizer
    step, while the clipped gradients are still there.

    Args:
        source: a model adapted with `SVDLinear`, or the `Factors` of another library's triplets; all have the same r.
        target_rank: average number of singular values that a matrix keeps, 1 <= target_rank < r.
        target_total_rank: number of singular values that all matrices keep together; both, if given, must agree.
        init_warmup: steps at the start without a mask (paper: t_i); below 1 a fraction of all steps.
        final_warmup: steps at the end with the target budget (paper: t_f); below 1 a fraction of all steps.
        mask_interval: steps from one mask to the next between the two warm-ups (paper: Delta_T).
        total_step: optimizer steps of the whole run (paper: T); None: `begin` will say it.
        beta1, beta2: decay of the averages of importance and of its uncertainty, in (0, 1).

    Raises:
        InputError: a value outside its range, with the numbers (ledger A6).
    """

    def __init__(
        self,
        source: nn.Module | Factors,
        *,
        target_rank: int | None,
        init_warmup: float,
        final_warmup: float,
        mask_interval: int,
        total_step: int | None = None,
        target_total_rank: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        of = factors(source)
        if not of.between or any(e.shape != (a.shape[0], 1) for e, a in zip(of.between, of.A, strict=True)):
            raise InputError("AdaLoRA needs triplets (layers SVDLinear, with singular values E of shape (r, 1)).")
        if len({len(e) for e in of.between}) > 1:
            raise InputError("AdaLoRA needs matrices of one rank, here they start with different ones.")
        self.factors, self.names, self.A, self.B, self.E = of, of.names, of.A, of.B, of.between
        self.r = len(self.E[0])
        self.total_rank = sum(e.shape[0] for e in self.E)
        for name, value in (("target_rank", target_rank), ("target_total_rank", target_total_rank)):
            if value is not None and value != int(value):
                raise InputError(f"{name} is {value}, it must be a whole number.")
        check_numbers(init_warmup, final_warmup, mask_interval, beta1, beta2)
        self.target_total = check_budget(self.total_rank, len(self.names), target_rank, target_total_rank)
        self.warmups, self.mask_interval = (init_warmup, final_warmup), mask_interval
        self.init_warmup, self.final_warmup = (int(value) for value in self.warmups)  # `begin` sets them again
        self.beta1, self.beta2 = beta1, beta2
        self.total_step = 0
        if total_step is not None:
            self.begin(total_step)
        self.restart()

    def begin(self, total_step: int) -> None:
        """Set the number of optimizer steps of the whole run; the budget's schedule depends on it.

        Raises:
            InputError: the two warm-ups leave no step in between (ledger A6).
        """
        self.init_warmup, self.final_warmup = (whole_steps(value, total_step) for value in self.warmups)
        check_schedule(self.init_warmup, self.final_warmup, total_step)
        self.total_step = total_step
        if not self.at_target(total_step):
            logger.warning(
                "the last step masks nothing, and masked values grow again: the trained model will have up to %d "
                "singular values and not %d; with final_warmup of 2 or more it has %d",
                self.total_rank,
                self.target_total,
                self.target_total,
            )

    def restart(self) -> None:
        """Forget all importance, since the run starts over."""
        self.parameters = [*self.A, *self.B, *self.E]
        self._averages: tuple[list[Tensor], list[Tensor]] | None = None
        self.budget = self.total_rank
        self.threshold: Tensor | None = None  # scalar on the device; None until the first mask
        self._masked: Tensor | None = None  # (matrices, r) bool, the values that the last mask set to 0

    @property
    def importance(self) -> list[Tensor]:
        """Ibar of every element: of all A, then of all B, then of all E. It begins with zeros."""
        return self._start()[0]

    @property
    def uncertainty(self) -> list[Tensor]:
        """U of every element, in the order of `importance`."""
        return self._start()[1]

    def _start(self) -> tuple[list[Tensor], list[Tensor]]:
        """Make the averages when they are first needed, because the model is on its final device only then."""
        if self._averages is None:
            full = [torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype for p in self.parameters]
            zeros = [torch.zeros_like(p, dtype=t) for p, t in zip(self.parameters, full, strict=True)]
            self._averages = zeros, [torch.zeros_like(z) for z in zeros]
        return self._averages

    def schedule(self, step: int) -> tuple[int, bool]:
        """Budget (total singular values) and whether a mask is due at this step (ledger A4; paper eq. 12)."""
        if step <= self.init_warmup:
            return self.total_rank, False
        if step > self.total_step - self.final_warmup:
            return self.target_total, True
        left = 1 - (step - self.init_warmup) / (self.total_step - self.final_warmup - self.init_warmup)
        budget = int(self.target_total + (self.total_rank - self.target_total) * left**3)
        return budget, step % self.mask_interval == 0

    def at_target(self, steps: int) -> bool:
        """Whether the model after `steps` optimizer steps is masked to the target budget of the final phase.

        That is so from T - t_f + 2 steps on, or T - t_f + 1 if mask_interval divides T - t_f: every step of an index
        above T - t_f masks, and that of index T - t_f only in the rhythm. Values that a mask has set to 0 grow again
        at the next step, so the last step must have masked.
        """
        last = steps - 1
        return last >= self.total_step - self.final_warmup and self.schedule(last) == (self.target_total, True)

    @torch.no_grad()
    def step(self, step: int, gradients_valid: bool = True) -> bool:
        """Update the importance, and set the singular values that fall out of the budget to 0.

        Args:
            step: index of the optimizer step that was just made (0 for the first).
            gradients_valid: False if a gradient scaler skipped the step; then the importance stays (ledger A7).

        Returns:
            Whether a mask was applied.

        Raises:
            RuntimeError: `begin` has not been called, so the number of steps of the run is not known.
        """
        if not self.total_step:
            raise RuntimeError("the schedule of the budget is not known yet: call begin(total_step) before step")
        # Importance is not updated at step 0 (ledger A2), nor in the final phase (ledger A3).
        if gradients_valid and 0 < step < self.total_step - self.final_warmup:
            self._update_importance()
        self.budget, masked = self.schedule(step)
        if masked:
            self._mask(self.total_rank - self.budget)
        return masked

    def _update_importance(self) -> None:
        """I = |p grad|; Ibar and U are its average and the average of |I - Ibar| (ledger A1; paper eq. 8 to 10)."""
        importance, uncertainty = self._start()
        # A factor that the forward has not used has no gradient, so this step adds nothing to its importance.
        gradients: list[Any] = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        products = list(torch._foreach_mul([p.detach() for p in self.parameters], gradients))
        torch._foreach_abs_(products)
        if products[0].dtype != importance[0].dtype:
            products = [p.to(i.dtype) for p, i in zip(products, importance, strict=True)]
        torch._foreach_lerp_(importance, products, 1 - self.beta1)
        deviations = torch._foreach_sub(products, importance)
        torch._foreach_abs_(deviations)
        torch._foreach_lerp_(uncertainty, deviations, 1 - self.beta2)

    def scores(self) -> Tensor:
        """Score of every triplet, (matrices, r): that of E plus A's row mean and B's column mean (A5; eq. 7, 11)."""
        scores = torch._foreach_mul(self.importance, self.uncertainty)
        n = len(self.names)
        score = torch.stack(scores[2 * n :]).squeeze(2)
        for part, dim in ((scores[:n], 1), (scores[n : 2 * n], 0)):
            shapes: dict[torch.Size, list[int]] = {}
            for i, s in enumerate(part):
                shapes.setdefault(s.shape, []).append(i)
            means = torch.cat([torch.stack([part[i] for i in rows]).mean(dim + 1) for rows in shapes.values()])
            order = [i for rows in shapes.values() for i in rows]
            inverse = sorted(range(n), key=order.__getitem__)
            score = score + torch.stack([means[i] for i in inverse])
        return score

    def _mask(self, remove: int) -> None:
        """Set every E to 0 whose score is at most the `remove`-th smallest. Ties there are all removed (ledger A5)."""
        score = self.scores()
        self.threshold = score.view(-1).kthvalue(remove).values
        self._masked = score <= self.threshold
        values = torch.stack([e.detach() for e in self.E]).squeeze(2)
        values = values.masked_fill(self._masked, 0.0).unsqueeze(2)
        torch._foreach_copy_([e.detach() for e in self.E], list(values.unbind()))

    def ranks(self) -> dict[str, int]:
        """Non-zero singular values of each matrix. Synchronises with the GPU."""
        return self.factors.ranks()

    def kept_ranks(self) -> dict[str, int]:
        """How many singular values of each matrix the last mask has kept; r before the first mask.

        The optimizer moves masked values away from 0 at its next step. So between two masks `ranks` counts more values
        than this method, up to all of them. Both synchronise with the GPU.
        """
        counts = [self.r] * len(self.names) if self._masked is None else (~self._masked).sum(1).tolist()
        return dict(zip(self.names, counts, strict=True))

    def remaining_parameters(self) -> int:
        """Kept triplet elements: in + out + 1 for each singular value that the last mask kept."""
        sizes = [a.shape[1] + b.shape[0] + 1 for a, b in zip(self.A, self.B, strict=True)]
        return sum(rank * size for rank, size in zip(self.kept_ranks().values(), sizes, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Importance and uncertainty by parameter; threshold, places and budget of the last mask (ledger A8)."""
        keys = [f"{name}.lora_{kind}" for kind in "ABE" for name in self.names]
        state = {f"importance.{k}": t for k, t in zip(keys, self.importance, strict=True)}
        state |= {f"uncertainty.{k}": t for k, t in zip(keys, self.uncertainty, strict=True)}
        if self.threshold is not None and self._masked is not None:
            state |= {"threshold": self.threshold, "masked": self._masked}
        if self.budget != self.total_rank:
            state["budget"] = torch.tensor(self.budget)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            InputError: a tensor is missing or of another shape; the message names it.
        """
        keys = [f"{name}.lora_{kind}" for kind in "ABE" for name in self.names]
        for prefix, tensors in (("importance", self.importance), ("uncertainty", self.uncertainty)):
            for key, tensor in zip(keys, tensors, strict=True):
                found = state.get(f"{prefix}.{key}")
                if found is None or found.shape != tensor.shape:
                    shape = "nothing" if found is None else f"shape {tuple(found.shape)}"
                    raise InputError(
                        f"the allocator's state has {shape} for {prefix}.{key}, shape {tuple(tensor.shape)} is needed: "
                        "resume from a checkpoint of the same run, or start over with --overwrite_output_dir."
                    )
                tensor.copy_(found)
        device = self.E[0].device
        self.threshold = state["threshold"].to(device) if "threshold" in state else None
        self.budget = int(state["budget"]) if "budget" in state else self.total_rank  # the next step sets it again
        self._masked = None
        if "masked" in state:
            self._masked = state["masked"].to(device)
        elif "kept" in state:  # an earlier format has the number of each matrix alone; its sums are all that is read
            self._masked = torch.arange(self.r, device=device) >= state["kept"].to(device).unsqueeze(1)
        elif self.threshold is not None:  # a still earlier one; exact if the importance has not changed since the mask
            self._masked = self.scores() <= self.threshold


def check_numbers(init_warmup: float, final_warmup: float, mask_interval: int, beta1: float, beta2: float) -> None:
    """Refuse numbers that no run can be allocated with.

    Raises:
        InputError: names the number.
    """
    check_at_least(0, init_warmup=init_warmup, final_warmup=final_warmup)
    check_at_least(1, mask_interval=mask_interval)
    for name, steps in (("init_warmup", init_warmup), ("final_warmup", final_warmup)):
        if steps > 1 and steps % 1:
            raise InputError(f"{name} is {steps:g}, it must be a whole number of steps, or a fraction below 1.")
    if mask_interval % 1:
        raise InputError(f"mask_interval is {mask_interval:g}, it must be a whole number of steps.")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 < beta < 1:
            raise InputError(f"{name} is {beta}, it must lie between 0 and 1, both excluded.")


def check_budget(total: int, matrices: int, target_rank: int | None, target_total_rank: int | None) -> int:
    """The total target rank (ledger A6).

    Raises:
        InputError: the targets prune nothing, leave nothing, or contradict each other.
    """
    r = total // matrices
    if target_rank is None and target_total_rank is None:
        raise InputError(
            f"AdaLoRA needs a budget: give --target_rank (1 to {r - 1}, average of a matrix) or --target_total_rank "
            f"(1 to {total - 1}, all {matrices} matrices together)."
        )
    if target_rank is not None and not 1 <= target_rank < r:
        raise InputError(f"target_rank must be between 1 and {r - 1}, below lora_r = {r}; it is {target_rank}.")
    if target_total_rank is not None and not 1 <= target_total_rank < total:
        raise InputError(
            f"target_total_rank must be between 1 and {total - 1}, since {matrices} matrices of lora_r = {r} have "
            f"{total} singular values in all; it is {target_total_rank}."
        )
    if target_rank is not None and target_total_rank is not None and target_rank * matrices != target_total_rank:
        raise InputError(
            f"target_rank {target_rank} x {matrices} matrices = {target_rank * matrices} disagrees with "
            f"target_total_rank {target_total_rank}: give one of the two."
        )
    return target_total_rank if target_total_rank is not None else (target_rank or 0) * matrices


def whole_steps(value: float, total_step: int) -> int:
    """A number of steps: `value` itself, or, if it is below 1, the nearest number to that fraction of all steps."""
    return round(value * total_step) if value < 1 else int(value)


def check_schedule(init_warmup: int, final_warmup: int, total_step: int) -> None:
    """Refuse warm-ups that leave no step for the budget to fall (ledger A6)."""
    if init_warmup + final_warmup >= total_step:
        raise InputError(
            f"init_warmup {init_warmup} + final_warmup {final_warmup} must stay below the total of {total_step} "
            "optimizer steps: lower them, or train longer (--num_train_epochs, --max_steps) or with a smaller batch."
        )
