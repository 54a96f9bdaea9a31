"""What the tests of adapters share: tiny pretrained models, and the output folders of runs that adapted them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    DebertaV2Config,
    RobertaConfig,
)

from loralib.adapt import ROLES, adapt, adapted_layers
from loralib.adapters.own import save_adapter
from loralib.layers import GatedLinear, LoRALinear, SVDLinear

# What makes a DeBERTa-v2 configuration one of DeBERTa-v3.
V3: dict[str, Any] = {
    "relative_attention": True, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
}  # fmt: skip
SIZE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 60,
    "max_position_embeddings": 40, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "deberta": DebertaV2Config(
        **SIZE, **V3, position_buckets=8, pooler_hidden_size=24,
    ),
    "bert": BertConfig(**SIZE),
    "roberta": RobertaConfig(**SIZE, pad_token_id=0),
}  # fmt: skip
R = 4


class RootScaled(LoRALinear):
    """A variant that knows nothing of files: alpha / sqrt(r)."""

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r**0.5


class Lengthened(LoRALinear):
    """A variant with a parameter of its own and a product that is not low-rank: rows of W + s B A, stretched."""

    def add_parameters(self, **like: Any) -> None:
        self.lora_length = nn.Parameter(torch.ones(self.out_features, **like))

    def delta_weight(self) -> Tensor:
        return self.lora_length.unsqueeze(1) * (self.weight + super().delta_weight()) - self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.delta_weight(), self.bias)


# What stands between the factors after training: all of it, a part, or nothing in some or all matrices.
METHODS: dict[str, tuple[type[LoRALinear], Any]] = {
    "lora": (LoRALinear, None),
    "svd-lora": (SVDLinear, lambda i: R),
    "adalora": (SVDLinear, lambda i: i % (R + 1)),
    "adalora-all-zero": (SVDLinear, lambda i: 0),
    "sora": (GatedLinear, lambda i: (3 * i) % (R + 1)),
    "rm-lora": (LoRALinear, None),
    "variant": (RootScaled, None),
}


def fill(model: nn.Module, left: Any) -> None:
    """Values as after training, from one generator; `left(i)`: how many directions of matrix i are not zeroed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.15)
        for i, (_, layer) in enumerate(adapted_layers(model)):
            if left is not None:
                d = layer.lora_E.view(-1) if hasattr(layer, "lora_E") else layer.lora_gate.view(-1)
                d[torch.randperm(R, generator=generator)[left(i) :]] = 0


def make_base(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A pretrained model without a head, and a tokenizer."""
    torch.manual_seed(0)
    AutoModel.from_config(FAMILIES[family]).to(dtype).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def load_base(base: Path, num_labels: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(base, num_labels=num_labels)
    return AutoModelForSequenceClassification.from_pretrained(base, config=config, dtype=dtype).eval()


def facts(base: Path, method: str = "lora", **more: Any) -> dict[str, Any]:
    return {"method": method, "layer": "frd", "lora_r": R, "lora_alpha": 12.0, "base_model": str(base)} | more


def make_run(
    folder: Path, base: Path, method: str = "lora", num_labels: int = 3, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A run's output folder, and the model that it was saved from."""
    layer, left = METHODS[method]
    model = load_base(base, num_labels, dtype)
    adapt(model, layer, list(ROLES), r=R, lora_alpha=12.0)
    fill(model, left)
    save_adapter(model, folder, facts(base, method))
    model.config.save_pretrained(folder)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(36).view(3, 12) * 7 % 55 + 5
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        return model(input_ids=ids * mask, attention_mask=mask).logits
