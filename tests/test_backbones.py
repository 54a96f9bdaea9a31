"""What --lora_module means in each family of models, on tiny configurations, and that adapters of each are exported."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertTokenizer

from loralib.adapt import ROLES, adapt, match_modules, parameters
from loralib.adapters.exports import export_merged
from loralib.adapters.own import save_adapter
from loralib.adapters.peft import export_peft
from loralib.adapters.start import load_lora
from loralib.errors import InputError
from loralib.layers import LoRALinear, SVDLinear

SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50,
    "max_position_embeddings": 40,
}  # fmt: skip
DECODER = SIZE | {"num_key_value_heads": 1, "pad_token_id": 0}
V3 = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16}
CONFIGS: dict[str, Any] = {
    "DeBERTa": lambda: transformers.DebertaConfig(**SIZE, **V3),
    "DeBERTa-v2": lambda: transformers.DebertaV2Config(**SIZE, **V3, conv_kernel_size=3),
    "DeBERTa-v3": lambda: transformers.DebertaV2Config(**SIZE, **V3, share_att_key=True, position_buckets=8),
    "BERT": lambda: transformers.BertConfig(**SIZE),
    "RoBERTa": lambda: transformers.RobertaConfig(**SIZE),
    "XLM-R": lambda: transformers.XLMRobertaConfig(**SIZE),
    "ELECTRA": lambda: transformers.ElectraConfig(**SIZE, embedding_size=8),
    "DistilBERT": lambda: transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=50),
    "ModernBERT": lambda: transformers.ModernBertConfig(
        **SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "Llama": lambda: transformers.LlamaConfig(**DECODER),
    "Qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "Qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=8),
}
BERT_NAMES = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention.output": "attention.output.dense", "intermediate": "intermediate.dense", "layer.output": "output.dense",
}  # fmt: skip
DEBERTA_NAMES = BERT_NAMES | {
    "query": "attention.self.query_proj", "key": "attention.self.key_proj", "value": "attention.self.value_proj",
}  # fmt: skip
DECODER_NAMES = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj", "intermediate": "mlp.gate_proj mlp.up_proj",
    "layer.output": "mlp.down_proj",
}  # fmt: skip
# What follows the number of the layer; a role that is missing here must be refused.
NAMES: dict[str, dict[str, str]] = {
    "DeBERTa": {role: name for role, name in BERT_NAMES.items() if role not in ("query", "key", "value")},
    "DeBERTa-v2": DEBERTA_NAMES,
    "DeBERTa-v3": DEBERTA_NAMES,
    "BERT": BERT_NAMES,
    "RoBERTa": BERT_NAMES,
    "XLM-R": BERT_NAMES,
    "ELECTRA": BERT_NAMES,
    "DistilBERT": {
        "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
        "attention.output": "attention.out_lin", "intermediate": "ffn.lin1", "layer.output": "ffn.lin2",
    },
    "ModernBERT": {"attention.output": "attn.Wo", "intermediate": "mlp.Wi", "layer.output": "mlp.Wo"},
    "Llama": DECODER_NAMES,
    "Qwen2": DECODER_NAMES,
    "Qwen3": DECODER_NAMES,
}  # fmt: skip
FUSED = {"DeBERTa": "in_proj", "ModernBERT": "Wqkv"}
# Linear layers of the backbone beside the six roles, which all-linear takes too.
FURTHER = {
    "DeBERTa": 2 * ["attention.self.in_proj", "attention.self.pos_proj", "attention.self.pos_q_proj"],
    "DeBERTa-v2": 2 * ["attention.self.pos_key_proj", "attention.self.pos_query_proj"],
    "ELECTRA": ["electra.embeddings_project"],
    "ModernBERT": 2 * ["attn.Wqkv"],
}
HEADS = {
    "DeBERTa": "pooler classifier", "DeBERTa-v2": "pooler classifier", "DeBERTa-v3": "pooler classifier",
    "BERT": "bert.pooler classifier", "DistilBERT": "pre_classifier classifier", "ModernBERT": "head classifier",
    "Llama": "score", "Qwen2": "score", "Qwen3": "score",
}  # fmt: skip
FAMILY = pytest.mark.parametrize("family", CONFIGS)


def build(family: str) -> nn.Module:
    return AutoModelForSequenceClassification.from_config(CONFIGS[family]())


def suffixes(names: list[str]) -> list[str]:
    return [re.sub(r"^.*\.\d+\.", "", name) for name in names]


@FAMILY
@pytest.mark.parametrize("role", ROLES)
def test_the_six_names(family: str, role: str) -> None:
    model = build(family)
    wanted = NAMES[family].get(role)
    if wanted is not None:
        assert suffixes(match_modules(model, [role])) == 2 * wanted.split()
        return
    with pytest.raises(InputError) as refused:
        match_modules(model, [role])
    said = str(refused.value)
    assert f"{role!r} matches no linear layer" in said and "one layer there, " in said and FUSED[family] in said
    assert all(name in said for name in NAMES[family])


@FAMILY
def test_real_names_of_layers_are_taken_as_well(family: str) -> None:
    model = build(family)
    for name in (*" ".join(NAMES[family].values()).split(), *FURTHER.get(family, [])):
        last = name.rpartition(".")[2]
        for wanted in {name, last}:
            found = match_modules(model, [wanted])
            assert name in [*suffixes(found), *found]
            assert all(f".{n}".endswith(f".{wanted}") for n in found)


@FAMILY
def test_all_linear_is_the_backbone_without_the_head(family: str) -> None:
    model = build(family)
    expected = sorted(2 * " ".join(NAMES[family].values()).split() + FURTHER.get(family, []))
    assert sorted(suffixes(match_modules(model, ["all-linear"]))) == expected


@FAMILY
def test_factors_and_head_train_and_nothing_else(family: str) -> None:
    model = build(family)
    adapt(model, SVDLinear, list(NAMES[family]), r=2, lora_alpha=4.0)
    heads = HEADS.get(family, "classifier").split()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    of_head = {n for n in trained if "lora_" not in n}
    assert of_head == {n for n, _ in model.named_parameters() if any(n.startswith(f"{h}.") for h in heads)}
    ids = torch.randint(5, 50, (2, 9))
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    counts = parameters(model)
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["head"] == sum(dict(model.named_parameters())[n].numel() for n in of_head)


@FAMILY
def test_adapters_of_every_family_go_out_and_come_back(family: str, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    AutoModel.from_config(CONFIGS[family]()).double().save_pretrained(base)
    (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    BertTokenizer(str(base / "vocab.txt")).save_pretrained(base)

    def load(folder: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float64).eval()

    trained = load(base)
    adapt(trained, LoRALinear, ["all-linear"], r=2, lora_alpha=4.0)
    for p in trained.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    save_adapter(trained, run, {"lora_r": 2, "lora_alpha": 4.0, "base_model": str(base)})
    trained.config.save_pretrained(run)
    export_peft(run, tmp_path / "peft")
    export_merged(run, tmp_path / "merged")
    ids = torch.randint(5, 50, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = trained(**inputs).logits
        assert (load(base)(**inputs).logits - expected).abs().max() > 1e-2
        reloaded = load(base)
        adapt(reloaded, LoRALinear, ["all-linear"], r=2, lora_alpha=4.0)
        load_lora(reloaded, tmp_path / "peft")
        for model in (
            reloaded,
            load(tmp_path / "merged"),
            peft.PeftModel.from_pretrained(load(base), tmp_path / "peft"),
        ):
            assert (model.eval()(**inputs).logits - expected).abs().max() < 1e-10
