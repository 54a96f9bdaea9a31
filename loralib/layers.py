"""Adapted linear layers: a frozen weight plus a trainable product of two low-rank factors.

Every layer is an `nn.Linear` whose parameters keep their place and name (`weight`, `bias`). The tensors that it adds
have the names of the released state dicts: `lora_A` (r, in), `lora_B` (out, r), `lora_E` (r, 1), `ranknum` (1,),
`lora_gate` (1, r). Write a variant as a subclass of `LoRALinear`, and let the name of each parameter that it trains
begin with `lora_`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralib.errors import InputError
from loralib.kernels import low_rank


class LoRALinear(nn.Linear):
    """LoRA (arXiv 2106.09685, eq. 3), the `frd` layer: y = x W^T + b + (alpha / r) x A^T B^T.

    The layer takes over the parameters of `linear`: they stay the same objects under the same names. At the start
    A ~ N(0, init_std) and B = 0, so a fresh layer computes what the linear layer computed (ledger L2, L3). It freezes
    nothing; `adapt` does.

    Args:
        linear: the layer to adapt, (in -> out).
        r: rank, 1 or more.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropout only on the input of the low-rank path (ledger L4).
        init_std: standard deviation of the initial factors.

    Raises:
        InputError: r or lora_dropout lies outside its range.
    """

    # Name of the parameter with the r numbers between the factors; None where there are none.
    between: str | None = None
    # Names of factors (`lora_...`) that do not train, and of factors that all layers of one shape share.
    frozen: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    # The first 64 values of the pretrained `weight`, for a checksum, if `reset_lora_parameters` has changed it.
    pretrained: Tensor | None = None
    # What loralib.kernels.prepare has computed for the next use of the layer: autocast's dtype (None: it is off), and
    # weight, bias, diag(d) A and B in this dtype.
    prepared: tuple[torch.dtype | None, Sequence[Any]] | None = None

    def __init__(
        self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, init_std: float = 0.02
    ) -> None:
        if r < 1 or r != int(r):
            raise InputError(f"lora_r is {r}, it must be a whole number of 1 or more.")
        if not 0 <= lora_dropout < 1:
            raise InputError(f"lora_dropout is {lora_dropout}, it must be at least 0 and below 1.")
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.r, self.lora_alpha, self.lora_dropout, self.init_std = r, lora_alpha, lora_dropout, init_std
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **like))
        self.add_parameters(**like)
        before = self.weight.detach().clone()
        self.reset_lora_parameters()
        if not self.weight.is_meta and not torch.equal(before, self.weight):
            self._keep_start(before)

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product (ledger L3)."""
        return self.lora_alpha / self.r

    def add_parameters(self, **like: Any) -> None:
        """Register what a variant trains beside A and B. `like` holds device and dtype."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the adapter adds to the linear layer, by name: those whose names begin with `lora_`."""
        return {n: p for n, p in self.named_parameters(recurse=False) if n.startswith("lora_")}

    def reset_lora_parameters(self) -> None:
        """Draw fresh factors (ledger L2)."""
        nn.init.normal_(self.lora_A, std=self.init_std)
        nn.init.zeros_(self.lora_B)

    def _keep_start(self, before: Tensor) -> None:
        """Keep what a start such as PiSSA's has taken out of `weight`; checkpoints and exports need it.

        If it is exactly the product of the initial factors, they are kept as buffers `lora_A_start` (r, in) and
        `lora_B_start` (out, r). Otherwise nothing is kept, and the adapter can be merged with the layer's class alone.

        Args:
            before: (out, in), the weight before the start.
        """
        self.pretrained = before.reshape(-1)[:64]
        tolerance = 1e-2 if before.dtype in (torch.float16, torch.bfloat16) else 1e-4
        off = (self.weight.detach() + self.delta_weight().detach() - before).abs().max()
        if type(self).delta_weight is LoRALinear.delta_weight and off <= tolerance * before.abs().max():
            d, a = self.diagonal(), self.lora_A.detach()
            self.register_buffer("lora_A_start", a.clone() if d is None else d.detach().unsqueeze(1) * a)
            self.register_buffer("lora_B_start", self.lora_B.detach().clone())

    @torch.no_grad()
    def move_start(self, a: Tensor, b: Tensor) -> None:
        """Change `weight` to what it would be if the layer had started with the factors a (r, in) and b (out, r)."""
        own_a, own_b = self.get_buffer("lora_A_start"), self.get_buffer("lora_B_start")
        a, b = a.to(own_a), b.to(own_b)
        if not (torch.equal(a, own_a) and torch.equal(b, own_b)):
            self.weight.add_(own_b @ own_a - b @ a, alpha=self.scaling)
            own_a.copy_(a)
            own_b.copy_(b)

    def diagonal(self) -> Tensor | None:
        """The numbers between the factors, (r,); None stands for ones."""
        return None if self.between is None else getattr(self, self.between).view(-1)

    def delta_weight(self) -> Tensor:
        """The update that the adapter adds to `weight`, (out, in)."""
        d = self.diagonal()
        return self.scaling * (self.lora_B @ (self.lora_A if d is None else d.unsqueeze(1) * self.lora_A))

    def train(self, mode: bool = True) -> "LoRALinear":
        self.prepared = None  # an interrupted forward may have left it
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """y = x W^T + b + s (z A^T d) B^T, where z is x, in training after dropout, and d is the `diagonal`."""
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            # The lines below in fewer operations. It has no rules for torch.func's transforms, so those take the lines.
            return low_rank.forward(self, x)
        z = F.dropout(x, self.lora_dropout, self.training)
        u = F.linear(z, self.lora_A)  # (..., r)
        d = self.diagonal()
        u = u if d is None else u * d
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(u, self.lora_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"


class SVDLinear(LoRALinear):
    """AdaLoRA's triplets (arXiv 2303.10512, eq. 3), the `svd` layer: y = x W^T + b + alpha / (r + 1e-5) x (E A)^T B^T.

    At the start E = 0 and A, B ~ N(0, init_std). E (r, 1) holds the singular values; the allocator sets some of them to
    0. `ranknum` (1,) is r, and stays r when values are pruned (ledger L3).
    """

    between = "lora_E"
    lora_E: nn.Parameter

    def add_parameters(self, **like: Any) -> None:
        self.lora_E = nn.Parameter(torch.empty(self.r, 1, **like))
        self.register_buffer("ranknum", torch.full((1,), float(self.r), **like))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r + 1e-5)

    def reset_lora_parameters(self) -> None:
        nn.init.normal_(self.lora_A, std=self.init_std)
        nn.init.normal_(self.lora_B, std=self.init_std)
        nn.init.zeros_(self.lora_E)


class GatedLinear(LoRALinear):
    """SoRA's gated factors (arXiv 2311.11696, eq. 4): y = x W^T + b + (alpha / r) (x A^T * gate) B^T.

    At the start gate (1, r) ~ N(0, 1), A ~ N(0, init_std) and B = 0 (ledger L2). The optimizer's threshold sets gates
    to 0.
    """

    between = "lora_gate"
    lora_gate: nn.Parameter

    def add_parameters(self, **like: Any) -> None:
        self.lora_gate = nn.Parameter(torch.empty(1, self.r, **like))

    def reset_lora_parameters(self) -> None:
        super().reset_lora_parameters()
        nn.init.normal_(self.lora_gate)


# Names, in files, of the factors whose product a start took out of the frozen weight.
START = ("lora_A_start", "lora_B_start")
KINDS: tuple[type[LoRALinear], ...] = (SVDLinear, GatedLinear, LoRALinear)
# Names, in files too, of the parameters that stand between the factors in the layers of this project.
DIAGONALS: tuple[str, ...] = tuple(kind.between for kind in KINDS if kind.between)
