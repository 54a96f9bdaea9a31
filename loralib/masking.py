"""RM-LoRA's random mask on the gradients of the low-rank factors (arXiv 2407.12074; ledger R1 to R6)."""

from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapt import Factors, factors
from loralib.errors import InputError


def stream(seed: int, key: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on `seed` and `key` alone, such as a step or an epoch."""
    # The large odd factor keeps neighbouring seeds from sharing a stream.
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + key) % 2**63)


class RandomMask:
    """Lets only `random_rank` of the r directions of each matrix receive a gradient.

    The draw changes with `key`, which is the number of the step or of the epoch.

    A direction is a row of A or a column of B. v1 makes one draw for a matrix and uses it for A and B; v2 makes one
    draw for A and one for B (ledger R4). A direction that is not drawn gets the gradient 0. Adam still sees this 0, so
    the direction moves on by momentum (ledger R6). For given matrices (their order, their ranks) and a given version, a
    draw depends only on seed and key, so that every process and every resumed run makes the same one (ledger R5).
    Another set or order of matrices, largest r or version may change any draw.

    Args:
        source: an adapted model, or the `Factors` of any library's layers.
        random_rank: number of directions that are drawn, from 1 to the smallest r.
        version: "v1" or "v2".
        seed: seed of the run.

    Raises:
        InputError: `random_rank` or `version` lies outside its range, or a factor is frozen.
    """

    def __init__(self, source: nn.Module | Factors, random_rank: int, version: str, seed: int) -> None:
        of = factors(source)
        self.names, self.A, self.B = of.names, of.A, of.B
        self.ranks = [a.shape[0] for a in of.A]
        self.r, least = max(self.ranks), min(self.ranks)
        frozen = [
            name for name, a, b in zip(of.names, of.A, of.B, strict=True) if not (a.requires_grad and b.requires_grad)
        ]
        if frozen:
            raise InputError(f"the factors of {frozen[0]} are frozen: RM-LoRA masks gradients, so both must train.")
        if version not in ("v1", "v2"):
            raise InputError(f"the version of the mask must be v1 or v2; it is {version!r}.")
        if random_rank != int(random_rank):
            raise InputError(f"random_rank is {random_rank}, it must be a whole number.")
        if not 1 <= random_rank <= least:
            raise InputError(f"random_rank must be between 1 and {least} (lora_r); it is {random_rank}.")
        self.random_rank, self.version, self.seed = random_rank, version, seed
        self.drawn: tuple[object, Tensor] | None = None  # the last key and its masks
        self._buffers: list[Tensor] = []  # the masks, in the shapes and on the device of the gradients

    def draw(self, key: int) -> Tensor:
        """Draw the directions of A and of B that are kept: (2, matrices, r) of zeros and ones, on the CPU.

        Args:
            key: index of the optimizer step, or number of completed epochs.
        """
        generator = stream(self.seed, key)
        noise = torch.rand(2 if self.version == "v2" else 1, len(self.names), self.r, generator=generator)
        if min(self.ranks) < self.r:  # places beyond a matrix's own r are never among the smallest
            noise[:, torch.arange(self.r) >= torch.tensor(self.ranks).unsqueeze(1)] = 2.0
        kept = noise.argsort(dim=-1)[..., : self.random_rank]
        return torch.zeros_like(noise).scatter_(-1, kept, 1.0).expand(2, -1, -1)

    @torch.no_grad()
    def apply(self, key: int) -> None:
        """Set the gradients of the directions that are not drawn for `key` to 0.

        A factor without a gradient, because the forward has not used it, is left alone.
        """
        gradients: list[Any] = [p.grad for p in (*self.A, *self.B)]
        if not self._buffers:
            pairs = zip(gradients, (*self.A, *self.B), strict=True)
            self._buffers = [torch.empty_like(p.detach() if g is None else g) for g, p in pairs]
        if self.drawn is None or self.drawn[0] != key:
            self.drawn = (key, self.draw(key))
            self._fill(self.drawn[1])
        buffers = self._buffers
        if any(g is None for g in gradients):
            there = [pair for pair in zip(gradients, buffers, strict=True) if pair[0] is not None]
            gradients, buffers = [g for g, _ in there], [b for _, b in there]
        torch._foreach_mul_(gradients, buffers)

    def gradient_norm(self) -> Tensor:
        """The norm of the gradients of all factors together: a scalar on their device."""
        return torch.nn.utils.get_total_norm([p.grad for p in (*self.A, *self.B) if p.grad is not None])

    def _fill(self, masks: Tensor) -> None:
        """Spread the draw (2, matrices, r) over the buffers, so that one multiplication masks all gradients."""
        device = self._buffers[0].device
        if device.type == "cuda":
            masks = masks.contiguous().pin_memory()
        masks = masks.to(device, self._buffers[0].dtype, non_blocking=True)
        rows = [m[: len(a)].unsqueeze(1).expand_as(a) for m, a in zip(masks[0].unbind(), self.A, strict=True)]
        columns = [m[: len(a)].expand_as(b) for m, a, b in zip(masks[1].unbind(), self.A, self.B, strict=True)]
        torch._foreach_copy_(self._buffers, [*rows, *columns])
