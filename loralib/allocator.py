"""AdaLoRA's rank allocator (arXiv 2303.10512, section 3.2 and 3.3; ledger A1 to A8): importance, budget, mask."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from loralib.adapt import adapted_layers
from loralib.errors import InputError
from loralib.layers import SVDLinear
from loralib.trainer import LoRATrainer

logger = logging.getLogger(__name__)


class RankAllocator:
    """Keeps the most important singular values of all matrices within a budget that falls to a target.

    A triplet is one singular value E_i with row i of A and column i of B. Call `step` right after each optimizer
    step, while the clipped gradients are still there.

    Args:
        model: holds the `SVDLinear` layers.
        target_rank: average number of singular values a matrix that remain, 1 <= target_rank < r.
        target_total_rank: their total over all matrices; decides over target_rank when given.
        init_warmup: steps at the start without any mask (paper: t_i).
        final_warmup: steps at the end at the target budget (paper: t_f).
        mask_interval: steps between masks in between (paper: Delta_T).
        total_step: optimizer steps of the whole run (paper: T).
        beta1, beta2: decay of the averages of importance and of its uncertainty, in (0, 1).

    Raises:
        InputError: a value outside its range, with the numbers (ledger A6).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_rank: int | None,
        init_warmup: int,
        final_warmup: int,
        mask_interval: int,
        total_step: int,
        target_total_rank: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        layers = [(name, layer) for name, layer in adapted_layers(model) if isinstance(layer, SVDLinear)]
        self.names = [name for name, _ in layers]
        self.A = [layer.lora_A for _, layer in layers]
        self.B = [layer.lora_B for _, layer in layers]
        self.E = [layer.lora_E for _, layer in layers]
        self.r = layers[0][1].r
        self.total_rank = sum(e.shape[0] for e in self.E)
        self.target_total = check_budget(self.total_rank, len(layers), target_rank, target_total_rank)
        check_schedule(init_warmup, final_warmup, total_step)
        self.init_warmup, self.final_warmup, self.mask_interval = init_warmup, final_warmup, mask_interval
        self.total_step, self.beta1, self.beta2 = total_step, beta1, beta2
        self.restart()

    def restart(self) -> None:
        """Forget all importance (a run that starts over)."""
        self.parameters = [*self.A, *self.B, *self.E]
        full = [torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype for p in self.parameters]
        self.importance = [torch.zeros_like(p, dtype=t) for p, t in zip(self.parameters, full, strict=True)]
        self.uncertainty = [torch.zeros_like(i) for i in self.importance]
        self.budget = self.total_rank
        self.threshold: Tensor | None = None  # scalar on the device; None until the first mask

    def schedule(self, step: int) -> tuple[int, bool]:
        """Budget (total singular values) and whether a mask is due at this step (ledger A4; paper eq. 12)."""
        if step <= self.init_warmup:
            return self.total_rank, False
        if step > self.total_step - self.final_warmup:
            return self.target_total, True
        left = 1 - (step - self.init_warmup) / (self.total_step - self.final_warmup - self.init_warmup)
        budget = int(self.target_total + (self.total_rank - self.target_total) * left**3)
        return budget, step % self.mask_interval == 0

    @torch.no_grad()
    def step(self, step: int, gradients_valid: bool = True) -> bool:
        """Update importance and mask what falls out of the budget.

        Args:
            step: number of the optimizer step that was just made, before it is counted (0 for the first).
            gradients_valid: False for a step that a gradient scaler skipped: importance stays (ledger A7).

        Returns:
            Whether a mask was applied.
        """
        # ledger A2 and A3: not at step 0, not in the final phase
        if gradients_valid and 0 < step < self.total_step - self.final_warmup:
            self._update_importance()
        self.budget, masked = self.schedule(step)
        if masked:
            self._mask(self.total_rank - self.budget)
        return masked

    def _update_importance(self) -> None:
        """I = |p grad|; Ibar and U are its average and the average of |I - Ibar| (ledger A1; paper eq. 8 to 10)."""
        gradients: list[Any] = [p.grad for p in self.parameters]
        products = list(torch._foreach_mul([p.detach() for p in self.parameters], gradients))
        torch._foreach_abs_(products)
        if products[0].dtype != self.importance[0].dtype:
            products = [p.to(i.dtype) for p, i in zip(products, self.importance, strict=True)]
        torch._foreach_lerp_(self.importance, products, 1 - self.beta1)
        deviations = torch._foreach_sub(products, self.importance)
        torch._foreach_abs_(deviations)
        torch._foreach_lerp_(self.uncertainty, deviations, 1 - self.beta2)

    def scores(self) -> Tensor:
        """Score of every triplet, (matrices, r) (ledger A5; paper eq. 7, 11): E's, A's row mean, B's column mean."""
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
        """Zero every E whose score is at most the `remove`-th smallest (ledger A5: ties fall together)."""
        score = self.scores()
        self.threshold = score.view(-1).kthvalue(remove).values
        values = torch.stack([e.detach() for e in self.E]).squeeze(2)
        values = values.masked_fill(score <= self.threshold, 0.0).unsqueeze(2)
        torch._foreach_copy_([e.detach() for e in self.E], list(values.unbind()))

    def ranks(self) -> dict[str, int]:
        """Non-zero singular values of each matrix. Reads the device."""
        counts = torch.stack([e.detach() for e in self.E]).count_nonzero(dim=(1, 2)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Importance and its uncertainty by parameter, and the threshold; the ranks are in E itself (ledger A8)."""
        keys = [f"{name}.lora_{kind}" for kind in "ABE" for name in self.names]
        state = {f"importance.{k}": t for k, t in zip(keys, self.importance, strict=True)}
        state |= {f"uncertainty.{k}": t for k, t in zip(keys, self.uncertainty, strict=True)}
        if self.threshold is not None:
            state["threshold"] = self.threshold
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state of `state_dict`.

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
        self.threshold = state["threshold"].to(self.E[0].device) if "threshold" in state else None


def check_budget(total: int, matrices: int, target_rank: int | None, target_total_rank: int | None) -> int:
    """The total target rank, refused where it prunes nothing or contradicts itself (ledger A6)."""
    r = total // matrices
    if target_rank is None and target_total_rank is None:
        raise InputError(
            f"AdaLoRA needs a budget: give --target_rank (1 to {r - 1}, average of a matrix) or --target_total_rank "
            f"(1 to {total - 1}, all {matrices} matrices together)."
        )
    if target_rank is not None and not 1 <= target_rank < r:
        raise InputError(f"target_rank is {target_rank}, it must lie in 1 to {r - 1}, below lora_r = {r}.")
    if target_total_rank is not None and not 1 <= target_total_rank < total:
        raise InputError(
            f"target_total_rank is {target_total_rank}, it must lie in 1 to {total - 1}: {matrices} matrices of "
            f"lora_r = {r} have {total} singular values in all."
        )
    if target_rank is not None and target_total_rank is not None and target_rank * matrices != target_total_rank:
        raise InputError(
            f"target_rank {target_rank} x {matrices} matrices = {target_rank * matrices} disagrees with "
            f"target_total_rank {target_total_rank}: give one of the two."
        )
    return target_total_rank if target_total_rank is not None else (target_rank or 0) * matrices


def check_schedule(init_warmup: int, final_warmup: int, total_step: int) -> None:
    """Refuse warm-ups that leave no step for the budget to fall (ledger A6)."""
    if init_warmup + final_warmup >= total_step:
        raise InputError(
            f"init_warmup {init_warmup} + final_warmup {final_warmup} must stay below the total of {total_step} "
            "optimizer steps: lower them, or train longer (--num_train_epochs, --max_steps) or with a smaller batch."
        )


class AllocatorCallback(TrainerCallback):
    """Runs a `RankAllocator` inside the Trainer.

    Args:
        trainer: the run's trainer (its TensorBoard writer is used).
        allocator: the allocator.
        interval: optimizer steps between two entries in TensorBoard (flag `tb_writter_loginterval`); None: as often
            as the loss is logged.
    """

    def __init__(self, trainer: LoRATrainer, allocator: RankAllocator, interval: int | None) -> None:
        self.trainer, self.allocator, self.interval = trainer, allocator, interval

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.allocator.total_step = state.max_steps  # the true one, also after auto_find_batch_size
        check_schedule(self.allocator.init_warmup, self.allocator.final_warmup, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        skipped = self.trainer.accelerator.optimizer_step_was_skipped
        self.allocator.step(state.global_step, gradients_valid=not skipped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % (self.interval or state.logging_steps) == 0 and state.is_world_process_zero:
            ranks = self.allocator.ranks()
            values: dict[str, float] = {
                "Budget/total_rank": self.allocator.budget,
                "Budget/sum_param": self.sum_parameters(ranks),
            }
            if self.allocator.threshold is not None:
                values["Budget/mask_threshold"] = self.allocator.threshold.item()
            self.trainer.add_scalars(values | {f"Ranknum/{name}": rank for name, rank in ranks.items()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Warn when nothing is left of the update: its rank is read where the loss is read anyway."""
        masked = self.allocator.threshold is not None
        if (
            masked
            and state.is_world_process_zero
            and "loss" in (logs or {})
            and not any(self.allocator.ranks().values())
        ):
            logger.warning(
                "step %d: the rank of every matrix is 0, so the adapter adds nothing: all triplets score the same; "
                "look at the learning rate and the gradients",
                state.global_step,
            )

    def sum_parameters(self, ranks: dict[str, int]) -> int:
        """Elements of the triplets that are left: rank (in + out + 1) for each matrix."""
        sizes = [a.shape[1] + b.shape[0] + 1 for a, b in zip(self.allocator.A, self.allocator.B, strict=True)]
        return sum(rank * size for rank, size in zip(ranks.values(), sizes, strict=True))

    def summary(self) -> dict[str, Any]:
        """Facts for run.json: the final rank of each matrix and of all."""
        ranks = self.allocator.ranks()
        return {"ranks": ranks, "total_rank": sum(ranks.values()), "target_total_rank": self.allocator.target_total}
