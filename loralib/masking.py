"""RM-LoRA's random mask on the gradients of the low-rank factors (arXiv 2407.12074; ledger R1 to R6)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from loralib.adapt import adapted_layers, is_lora
from loralib.trainer import LoRATrainer


class RandomMask:
    """Lets `random_rank` of the r directions of each matrix receive a gradient, drawn anew at each key.

    A direction is a row of A and a column of B. v1 draws once for a matrix and uses it for both; v2 draws for A and
    for B (ledger R4). A direction that is not drawn gets a zero gradient, which still enters Adam: it moves on by
    momentum (ledger R6). Draws depend on (seed, key) alone, so they are the same on every rank and after a resume
    (ledger R5).

    Args:
        model: holds the adapted layers, all of one r.
        random_rank: directions that stay, 1 to r.
        version: "v1" or "v2".
        seed: seed of the run.
    """

    def __init__(self, model: nn.Module, random_rank: int, version: str, seed: int) -> None:
        layers = list(adapted_layers(model))
        self.names = [name for name, _ in layers]
        self.A = [layer.lora_A for _, layer in layers]
        self.B = [layer.lora_B for _, layer in layers]
        self.r, self.random_rank, self.version, self.seed = layers[0][1].r, random_rank, version, seed
        self.drawn: tuple[object, Tensor] | None = None  # key and its masks
        self._buffers: list[Tensor] = []

    def draw(self, key: int) -> Tensor:
        """Which directions of A and of B are kept, (2, matrices, r) of zeros and ones on the CPU.

        Args:
            key: optimizer step or number of completed epochs (`mask_resample`).
        """
        # one stream for each (seed, key): the large odd factor keeps neighbouring seeds from sharing streams
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + key) % 2**63)
        noise = torch.rand(2 if self.version == "v2" else 1, len(self.names), self.r, generator=generator)
        kept = noise.argsort(dim=-1)[..., : self.random_rank]
        return torch.zeros_like(noise).scatter_(-1, kept, 1.0).expand(2, -1, -1)

    @torch.no_grad()
    def apply(self, key: int) -> None:
        """Zero the gradients of the directions that are not drawn for `key`."""
        gradients: list[Any] = [p.grad for p in (*self.A, *self.B)]
        if not self._buffers:
            self._buffers = [torch.empty_like(g) for g in gradients]
        if self.drawn is None or self.drawn[0] != key:
            self.drawn = (key, self.draw(key))
            self._fill(self.drawn[1])
        torch._foreach_mul_(gradients, self._buffers)

    def _fill(self, masks: Tensor) -> None:
        """Spread (2, matrices, r) over buffers of the gradients' shapes: one multiplication then masks everything."""
        device = self._buffers[0].device
        if device.type == "cuda":
            masks = masks.contiguous().pin_memory()
        masks = masks.to(device, self._buffers[0].dtype, non_blocking=True)
        rows = [m.unsqueeze(1).expand_as(p) for m, p in zip(masks[0].unbind(), self.A, strict=True)]
        columns = [m.unsqueeze(0).expand_as(p) for m, p in zip(masks[1].unbind(), self.B, strict=True)]
        torch._foreach_copy_(self._buffers, [*rows, *columns])


class MaskCallback(TrainerCallback):
    """Applies a `RandomMask` between clipping and the optimizer step (ledger, order of a step).

    Args:
        trainer: the run's trainer.
        mask: the mask.
        resample: "step" draws anew at each optimizer step, "epoch" at each epoch (ledger R3).
        as_released: the first step is unmasked, later ones zero the head's gradient too (ledger R1, R2).
    """

    def __init__(
        self, trainer: LoRATrainer, mask: RandomMask, resample: str = "step", as_released: bool = False
    ) -> None:
        self.trainer, self.mask, self.resample, self.as_released = trainer, mask, resample, as_released
        self.others = [p for n, p in trainer.model.named_parameters() if p.requires_grad and not is_lora(n)]
        self.norms: dict[str, Tensor] = {}  # on the device until they are logged

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.as_released and state.global_step == 0:
            return
        logged = args.logging_strategy == "steps" and (state.global_step + 1) % state.logging_steps == 0
        if logged:
            self.norms["train/grad_norm_before_mask"] = self._norm()
        self.mask.apply(state.global_step if self.resample == "step" else int(state.epoch or 0))
        if self.as_released:
            gradients: list[Any] = [p.grad for p in self.others]
            torch._foreach_zero_(gradients)
        if logged:
            self.norms["train/grad_norm_after_mask"] = self._norm()

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in (*self.mask.A, *self.mask.B) if p.grad is not None])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.add_scalars({name: norm.item() for name, norm in self.norms.items()})
        self.norms = {}

    def summary(self) -> dict[str, Any]:
        """Facts for run.json: directions that receive a gradient in each step."""
        sides = len(self.mask.A) * (1 if self.mask.version == "v1" else 2)
        return {"random_rank": self.mask.random_rank, "directions_per_step": self.mask.random_rank * sides}
