"""Adapters as files: every route out and in computes what the trained model computes, and broken files are refused."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DebertaV2Config,
    RobertaConfig,
)

from loralib.adapt import ROLES, adapt, adapted_layers, parameters, ranks
from loralib.adapters.exports import export_lora, export_merged, merge
from loralib.adapters.own import load_adapter, save_adapter
from loralib.adapters.peft import export_peft
from loralib.adapters.start import load_lora, read_adapter
from loralib.errors import InputError
from loralib.layers import GatedLinear, LoRALinear, SVDLinear

SIZE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 60,
    "max_position_embeddings": 40, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "deberta": DebertaV2Config(
        **SIZE, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm",
        position_buckets=8, pooler_hidden_size=24,
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
    """A variant with a parameter of its own and a product that is no low-rank one: rows of W + s B A, stretched."""

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


@pytest.mark.parametrize(
    "num_labels, dtype", [(3, torch.float32), (1, torch.float64)], ids=["classes-float32", "regression-float64"]
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_computes_what_the_trained_model_computes(
    tmp_path: Path, family: str, method: str, num_labels: int, dtype: torch.dtype
) -> None:
    base, run = make_base(tmp_path / "base", family, dtype), tmp_path / "run"
    trained = make_run(run, base, method, num_labels, dtype)
    expected = logits(trained)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert (expected - logits(load_base(base, num_labels, dtype))).abs().max() > 0.1  # there is something to get right

    def close(model: nn.Module) -> None:
        assert (logits(model.eval()) - expected).abs().max() <= tolerance

    def fresh() -> nn.Module:
        model = load_base(base, num_labels, dtype)
        adapt(model, METHODS[method][0], list(ROLES), r=R, lora_alpha=12.0)
        return model

    reloaded = fresh()
    load_adapter(reloaded, run)
    assert all(torch.equal(p, q) for p, q in zip(reloaded.parameters(), trained.parameters(), strict=True))
    for export, out in ((export_lora, "lora"), (export_peft, "peft"), (export_merged, "merged")):
        export(run, tmp_path / out)
    for source in (run, tmp_path / "lora", tmp_path / "peft"):
        model = fresh()
        load_lora(model, source)
        close(model)
    close(peft.PeftModel.from_pretrained(load_base(base, num_labels, dtype), str(tmp_path / "peft")))
    close(
        peft.AutoPeftModelForSequenceClassification.from_pretrained(
            str(tmp_path / "peft"), num_labels=num_labels, dtype=dtype
        )
    )
    close(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=dtype))
    # from an exported folder one can go on
    export_merged(tmp_path / "lora", tmp_path / "merged2")
    close(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged2", dtype=dtype))
    merge(trained)
    close(trained)
    assert not list(adapted_layers(trained))


# ---- files hold what counts say ----


def elements(file: Path) -> int:
    return sum(t.numel() for t in load_file(file).values())


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_the_counted_parameters_and_no_more(tmp_path: Path, method: str) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = make_run(tmp_path / "run", base, method)
    counts, constants = parameters(model), sum(hasattr(layer, "ranknum") for _, layer in adapted_layers(model))
    assert elements(tmp_path / "run" / "adapter.safetensors") == counts["trainable"] + constants
    export_lora(tmp_path / "run", tmp_path / "lora")
    export_peft(tmp_path / "run", tmp_path / "peft")
    assert elements(tmp_path / "lora" / "adapter.safetensors") == counts["remaining"] + counts["head"]
    zero_row = 0 if counts["remaining"] else 24 + 24  # of a query matrix
    assert elements(tmp_path / "peft" / "adapter_model.safetensors") == counts["remaining"] + counts["head"] + zero_row
    for file in (tmp_path / "lora" / "adapter.safetensors", tmp_path / "peft" / "adapter_model.safetensors"):
        assert file.stat().st_size <= 4 * elements(file) + 200 * len(load_file(file)) + 200  # values and their names
    config = json.loads((tmp_path / "lora" / "adapter.json").read_text())
    state = load_file(tmp_path / "lora" / "adapter.safetensors")
    assert (
        config["ranks"]
        == ranks(model)
        == {name: state[f"{name}.lora_A"].shape[0] if f"{name}.lora_A" in state else 0 for name in config["ranks"]}
    )


def test_the_config_is_readable_and_says_what_the_weights_do_not(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "deberta")
    model = make_run(tmp_path / "run", base, "adalora")
    config = json.loads((tmp_path / "run" / "adapter.json").read_text())
    assert config["method"] == "adalora" and config["base_model"] == str(base) and config["format_version"] == 1
    assert config["head"] == ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert config["ranks"] == ranks(model) and config["low_rank"] is True
    assert set(config["scaling"].values()) == {12.0 / (R + 1e-5)}


def test_peft_alpha_over_rank_is_the_trained_scaling(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base, "adalora")
    export_peft(tmp_path / "run", tmp_path / "peft")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "peft"))
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert sorted(config.modules_to_save) == ["bert.pooler", "classifier"]
    assert len(set(config.rank_pattern.values())) > 1  # otherwise this test would test nothing
    for name in config.target_modules:
        r, alpha = config.rank_pattern.get(name, config.r), config.alpha_pattern.get(name, config.lora_alpha)
        assert state[f"base_model.model.{name}.lora_A.weight"].shape[0] == r > 0
        assert alpha / r == pytest.approx(12.0 / (R + 1e-5), rel=1e-14)


def test_an_adapter_of_rank_zero_keeps_one_row_for_peft(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base, "adalora-all-zero")
    export_peft(tmp_path / "run", tmp_path / "peft")
    factors = {k: t for k, t in load_file(tmp_path / "peft" / "adapter_model.safetensors").items() if "lora_" in k}
    assert len(factors) == 2 and not any(t.any() for t in factors.values())
    export_lora(tmp_path / "run", tmp_path / "lora")
    with pytest.raises(InputError, match="rank 0 everywhere"):
        export_peft(tmp_path / "lora", tmp_path / "again")


def test_parameters_shared_between_matrices_are_saved_once_and_exported_everywhere(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = load_base(base, 2)
    adapt(model, LoRALinear, ["query", "key"], r=R, lora_alpha=12.0)
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers[1:]:
        layer.lora_A = layers[0].lora_A
    fill(model, None)
    counts = parameters(model)
    assert counts["lora"] == R * 24 + len(layers) * R * 24 == sum(m["trainable"] for m in counts["modules"].values())
    save_adapter(model, tmp_path / "run", facts(base))
    model.config.save_pretrained(tmp_path / "run")
    assert elements(tmp_path / "run" / "adapter.safetensors") == counts["trainable"]
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    for load in (load_adapter, load_lora):
        again = load_base(base, 2)
        adapt(again, LoRALinear, ["query", "key"], r=R, lora_alpha=12.0)
        for _, layer in list(adapted_layers(again))[1:]:
            layer.lora_A = next(adapted_layers(again))[1].lora_A
        load(again, tmp_path / "run")
        assert torch.equal(logits(again), logits(model))


def test_deberta_v3_base_fits_the_sizes_promised() -> None:
    """By arithmetic on a model without storage: r 8, six modules: 165,888 a rank, model part below 8 MB."""
    config = DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=128100,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=256,
        norm_rel_ebd="layer_norm", pooler_hidden_size=768, num_labels=2, type_vocab_size=0,
    )  # fmt: skip
    for layer, more in ((LoRALinear, 0), (SVDLinear, 1), (GatedLinear, 1)):
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        adapt(model, layer, list(ROLES), r=8, lora_alpha=16.0)
        trainable = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trainable)
        assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == 8 * (165_888 + 72 * more)
        assert 183e6 < sum(p.numel() for p in model.parameters() if not p.requires_grad) < 185e6
        assert 4 * count < 8e6  # float32
        # Adam keeps two numbers for each, AdaLoRA's allocator two for each of the low-rank ones
        assert 4 * (count + 2 * count + 2 * 8 * (165_888 + 72)) < 36e6


def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    before = os.umask(0o027)
    try:
        make_run(tmp_path / "run", base)
        for export in (export_lora, export_peft, export_merged):
            export(tmp_path / "run", tmp_path / export.__name__)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*.safetensors") if base not in p.parents]
    assert len(files) == 4 and {oct(p.stat().st_mode & 0o777) for p in files} == {"0o640"}


def test_a_merged_decoder_pads_also_from_a_checkpoint_without_tokenizer(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"  # as Llama's
    tokenizer.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    export_merged(tmp_path / "run", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "[SEP]"


def test_a_failing_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for room in ("exports", "peft"):
        monkeypatch.setattr(f"loralib.adapters.{room}.write_json", full)
    for export in (export_lora, export_peft):
        with pytest.raises(InputError, match="No space left"):
            export(tmp_path / "run", tmp_path / "out")

    def full_too(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", full_too)
    with pytest.raises(InputError, match="No space left"):
        export_merged(tmp_path / "run", tmp_path / "out")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        export_lora(tmp_path / "run", tmp_path / "out")


# ---- variants ----


def test_a_layer_with_a_product_of_its_own_is_refused_for_peft_and_merged_by_its_class(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = load_base(base, 2)
    adapt(model, Lengthened, ["query", "value"], r=R, lora_alpha=12.0)
    fill(model, None)
    save_adapter(model, tmp_path / "run", facts(base, "lengthened"))
    model.config.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match=r"lora_length'.* --layer"):
        export_peft(tmp_path / "run", tmp_path / "peft")
    with pytest.raises(InputError, match=r"lora_length'.* --layer"):
        export_merged(tmp_path / "run", tmp_path / "merged")
    export_merged(tmp_path / "run", tmp_path / "merged", layer=Lengthened)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    export_lora(tmp_path / "run", tmp_path / "lora")
    again = load_base(base, 2)
    adapt(again, Lengthened, ["query", "value"], r=R, lora_alpha=12.0)
    assert load_lora(again, tmp_path / "lora") == []
    assert torch.equal(logits(again), logits(model))


# ---- into a run of other settings ----


class Halved(GatedLinear):
    """A variant whose diagonal is not the tensor in the file."""

    def diagonal(self) -> Tensor:
        return super().diagonal() / 2


def test_a_layer_with_a_diagonal_of_its_own_is_not_folded_from_the_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = load_base(base, 2)
    adapt(model, Halved, ["query", "value"], r=R, lora_alpha=12.0)
    fill(model, None)
    save_adapter(model, tmp_path / "run", facts(base, "halved"))
    model.config.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match=r"--layer"):
        export_peft(tmp_path / "run", tmp_path / "peft")
    export_merged(tmp_path / "run", tmp_path / "merged", layer=Halved)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [LoRALinear, SVDLinear, GatedLinear])
@pytest.mark.parametrize("source", ["run", "peft"])
def test_a_higher_rank_and_another_alpha_keep_the_function_and_train_on(
    tmp_path: Path, source: str, layer: Any
) -> None:
    base = make_base(tmp_path / "base", "deberta", torch.float64)
    method = {LoRALinear: "lora", SVDLinear: "adalora", GatedLinear: "sora"}[layer]
    trained = make_run(tmp_path / "run", base, method, dtype=torch.float64)
    export_peft(tmp_path / "run", tmp_path / "peft")
    model = load_base(base, 3, torch.float64)
    adapt(model, layer, list(ROLES), r=7, lora_alpha=5.0)
    lines = load_lora(model, tmp_path / source)
    assert (logits(model) - logits(trained)).abs().max() < 1e-10
    assert any("lower rank" in line for line in lines) and any("scaling" in line for line in lines)
    model.train()
    model(input_ids=torch.arange(10).view(1, 10)).logits.square().sum().backward()
    for _, adapted in adapted_layers(model):  # no direction is dead: one of its factors has a gradient
        grads = [adapted.lora_A.grad.abs().sum(1), adapted.lora_B.grad.abs().sum(0)]
        grads += [p.grad.view(-1).abs() for n, p in adapted.named_parameters() if n in ("lora_E", "lora_gate")]
        assert bool((sum(grads) > 0).all())


def test_a_lower_rank_is_refused_with_key_and_both_shapes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    model = load_base(base, 3)
    adapt(model, LoRALinear, list(ROLES), r=2, lora_alpha=12.0)
    with pytest.raises(InputError, match=r"run.*\(4, 24\).*query\.lora_A.*\(2, 24\).*--lora_r 4"):
        load_lora(model, tmp_path / "run")


def test_another_layer_type_module_list_or_model_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base, "adalora")
    for layer, modules, said in (
        (LoRALinear, list(ROLES), r"lora_E', which the layer LoRALinear"),
        (SVDLinear, ["query"], r"adapts .*, which this run does not"),
        (SVDLinear, ["all-linear"], None),  # the same 12 matrices
    ):
        model = load_base(base, 3)
        adapt(model, layer, modules, r=R, lora_alpha=12.0)
        if said is None:
            assert load_lora(model, tmp_path / "run") == []
            continue
        with pytest.raises(InputError, match=said):
            load_lora(model, tmp_path / "run")
    config = BertConfig(**(SIZE | {"hidden_size": 12}))
    small = AutoModelForSequenceClassification.from_config(config)
    adapt(small, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
    with pytest.raises(InputError, match=r"\(4, 24\) and \(24, 4\).*\(4, 12\) and \(12, 4\)"):
        load_lora(small, tmp_path / "run")


def test_a_differing_head_starts_anew_and_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "deberta")
    trained = make_run(tmp_path / "run", base, "lora", num_labels=3)
    model = load_base(base, 2)
    adapt(model, LoRALinear, list(ROLES), r=R, lora_alpha=12.0)
    fresh = model.classifier.weight.detach().clone()
    lines = load_lora(model, tmp_path / "run")
    assert len(lines) == 1 and lines[0].endswith("classifier.weight, classifier.bias")
    assert torch.equal(model.classifier.weight, fresh)
    assert torch.equal(model.pooler.dense.weight, trained.pooler.dense.weight)


# ---- PEFT's own folders ----


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_wrote(tmp_path: Path, rslora: bool, pickled: bool) -> None:
    base = make_base(tmp_path / "base", "bert")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=["query", "value"], use_rslora=rslora,
        rank_pattern={"layer.0.attention.self.query": 2}, alpha_pattern={"layer.1.attention.self.value": 9},
        modules_to_save=["pooler"],
    )  # fmt: skip
    theirs = peft.get_peft_model(load_base(base, 3), config)
    for p in theirs.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    if pickled:
        file = tmp_path / "theirs" / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    model = load_base(base, 3)
    adapt(model, LoRALinear, ["query", "value"], r=4, lora_alpha=8.0)
    load_lora(model, tmp_path / "theirs")
    assert (logits(model) - logits(theirs.eval())).abs().max() < 1e-5


@pytest.mark.parametrize(
    "change, said",
    [
        ({"peft_type": "ADALORA"}, "only LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"kasa_config": {}, "trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "alpha_pattern"),
        ({"alpha_pattern": 3}, "alpha_pattern"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
    ],
)
def test_a_peft_folder_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    export_peft(tmp_path / "run", tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {}} | change))
    with pytest.raises(InputError, match=f"adapter_config.json.*{said}"):
        read_adapter(tmp_path / "peft")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")  # which is what is tested
def test_a_start_of_peft_that_changes_the_base_is_refused_until_converted(tmp_path: Path) -> None:
    """PiSSA subtracts the factors' first product from the frozen weights, which the file does not say."""
    base = make_base(tmp_path / "base", "bert")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query"], init_lora_weights="pissa",
        modules_to_save=["pooler"],
    )  # fmt: skip
    theirs = peft.get_peft_model(load_base(base, 3), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "trained")
    converted = str(tmp_path / "start")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=converted)
    model = load_base(base, 3)
    adapt(model, LoRALinear, ["query"], r=4, lora_alpha=8.0)
    with pytest.raises(InputError, match="init_lora_weights = 'pissa'.*path_initial_model_for_weight_conversion"):
        load_lora(model, tmp_path / "trained")
    load_lora(model, tmp_path / "plain")
    assert (logits(model) - logits(theirs.eval())).abs().max() < 1e-5


def test_a_peft_adapter_of_the_pooler_is_refused_by_its_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules="all-linear")
    peft.get_peft_model(load_base(base, 3), config).save_pretrained(tmp_path / "theirs")
    model = load_base(base, 3)
    adapt(model, LoRALinear, ["all-linear"], r=4, lora_alpha=8.0)
    with pytest.raises(InputError, match="adapts 'bert.pooler.dense', a part of the head"):
        load_lora(model, tmp_path / "theirs")


# ---- state dicts of the released code ----


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "model.safetensors"])
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "whole model"])
def test_released_state_dicts(tmp_path: Path, whole: bool, name: str) -> None:
    base = make_base(tmp_path / "base", "deberta")
    trained = make_run(tmp_path / "run", base, "adalora")
    state = trained.state_dict() if whole else load_file(tmp_path / "run" / "adapter.safetensors")
    if whole:
        state["deberta.embeddings.position_ids"] = torch.arange(40).view(1, 40)  # older transformers kept it
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    model = load_base(base, 3)
    adapt(model, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
    assert load_lora(model, tmp_path / name) == []
    assert torch.equal(logits(model), logits(trained))


def test_a_whole_model_with_another_backbone_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    state = make_run(tmp_path / "run", base).state_dict()
    key = "bert.encoder.layer.0.output.LayerNorm.bias"
    state[key] = state[key] + 0.01
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = load_base(base, 3)
    adapt(model, LoRALinear, list(ROLES), r=R, lora_alpha=12.0)
    with pytest.raises(InputError, match=rf"another backbone.*{key}.*0\.01"):
        load_lora(model, tmp_path / "pytorch_model.bin")


# ---- broken, foreign and hostile files ----


class Executed:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(__file__).parent / "executed"),)


def damaged(folder: Path, how: str) -> None:
    file, config = folder / "adapter.safetensors", folder / "adapter.json"
    state, told = load_file(file), json.loads(config.read_text())
    name = next(iter(told["ranks"]))
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        file.unlink()
    elif how == "cut weights":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "cut config":
        config.write_bytes(config.read_bytes()[:-7])
    elif how == "config is a list":
        config.write_text("[]")
    elif how == "deep config":
        config.write_text("[" * 100_000)
    elif how == "newer":
        config.write_text(json.dumps(told | {"format_version": 99}))
    elif how == "scaling is a text":
        config.write_text(json.dumps(told | {"scaling": told["scaling"] | {name: "2"}}))
    elif how == "scaling is infinite":
        config.write_text(json.dumps(told | {"scaling": told["scaling"] | {name: float("inf")}}))
    elif how == "another run's config":
        config.write_text(json.dumps(told | {"ranks": {name: 4}}))
    elif how == "the config of another step":
        config.write_text(json.dumps(told | {"ranks": told["ranks"] | {name: told["ranks"][name] - 1}}))
    elif how == "another head":
        config.write_text(json.dumps(told | {"head": []}))
    elif how == "a pickle":
        torch.save({"x": Executed()}, file)
    else:
        state[f"{name}.lora_A"] = {
            "one dimension": torch.zeros(24), "integers": torch.zeros(R, 24, dtype=torch.long),
            "not finite": torch.full((R, 24), float("nan")),
            "another rank": torch.zeros(R + 1, 24), "no rank": torch.zeros(0, 24),
        }[how]  # fmt: skip
        save_file(state, file)


@pytest.mark.parametrize(
    "how",
    ["no config", "no weights", "cut weights", "cut config", "config is a list", "deep config", "newer", "a pickle",
     "scaling is a text", "scaling is infinite", "another run's config", "the config of another step", "another head",
     "one dimension", "integers", "not finite", "another rank", "no rank"],
)  # fmt: skip
def test_a_damaged_adapter_is_one_sentence_that_names_the_file(tmp_path: Path, how: str) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    damaged(tmp_path / "run", how)
    with pytest.raises(InputError, match=r"run|adapter\.(json|safetensors)") as refused:
        export_lora(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500 + len(str(tmp_path)) * 2
    assert not (tmp_path / "out").exists() and not (Path(__file__).parent / "executed").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"base_model": "x" * 5000}, "base_model of 5000 characters"),
        ({"base_model": "a\0b"}, "base_model of 3 characters"),
        ({"base_model": ["a"]}, "names no base_model"),
        ({"lora_alpha": float("inf")}, "lora_alpha' = 'inf'"),
        ({"lora_r": 1e12}, r"lora_r 1e\+12, and its factors have rank 4"),
    ],
)
def test_a_strange_value_in_adapter_json_is_one_sentence(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    file = tmp_path / "run" / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=said) as refused:
        export_merged(tmp_path / "run", tmp_path / "out", layer=LoRALinear)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_mixed_precision_is_read_and_floats_of_eight_bits_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    trained = make_run(tmp_path / "run", base, "adalora")
    file = tmp_path / "run" / "adapter.safetensors"
    state = load_file(file)
    save_file({k: t.bfloat16() if k.endswith("lora_A") else t for k, t in state.items()}, file)
    for export in (export_lora, export_peft, export_merged):
        export(tmp_path / "run", tmp_path / export.__name__)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export_merged").eval()
    assert merged.dtype == torch.float32 and (logits(merged) - logits(trained)).abs().max() < 0.05
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        save_file({k: t.to(dtype) if k.endswith("lora_A") else t for k, t in state.items()}, file)
        model = load_base(base, 3)
        adapt(model, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
        with pytest.raises(InputError, match="in float8_.*cannot be read here"):
            export_lora(tmp_path / "run", tmp_path / "out")
        with pytest.raises(InputError, match="in float8_.*cannot be read here"):
            load_adapter(model, tmp_path / "run")


def test_a_merged_export_of_an_older_run_says_what_its_outputs_are(tmp_path: Path) -> None:
    """Runs of 409de3b wrote no problem_type, and a base model's own may be another."""
    base = make_base(tmp_path / "base", "bert")
    for labels, kind in ((1, "regression"), (3, "single_label_classification")):
        run = tmp_path / str(labels)
        make_run(run, base, num_labels=labels)
        names = None if labels == 1 else ["a", "b", "c"]
        for file, change in (("config.json", {"problem_type": None}), ("adapter.json", {"label_names": names})):
            (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | change))
        export_merged(run, tmp_path / f"{labels}-merged")
        config = AutoConfig.from_pretrained(tmp_path / f"{labels}-merged")
        assert config.problem_type == kind and (names is None or list(config.id2label.values()) == names)


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_nothing_in_a_pickle_is_executed(tmp_path: Path, suffix: str) -> None:
    for number, content in enumerate([{"x": Executed()}, Executed(), [1], {"x": 1}, {3: torch.zeros(1)}]):
        torch.save(content, tmp_path / f"{number}.{suffix}")
        with pytest.raises(InputError, match=rf"{number}\.{suffix}"):
            read_adapter(tmp_path / f"{number}.{suffix}")
    assert not (Path(__file__).parent / "executed").exists()


class Good:
    """The files of a good adapter in this project's format and in PEFT's, and a model that takes it."""

    files: dict[str, dict[str, bytes]]
    model: nn.Module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder / "own", make_base(folder / "base", "bert"), "sora")
    export_peft(folder / "own", folder / "peft")
    good = Good()
    good.files = {kind: {p.name: p.read_bytes() for p in (folder / kind).iterdir()} for kind in ("own", "peft")}
    good.model = load_base(folder / "base", 3)
    adapt(good.model, GatedLinear, list(ROLES), r=R, lora_alpha=12.0)
    return good


def mutated(content: bytes, data: Any) -> bytes:
    """Bytes set, cut off, put in or taken out, preferably in the first ones: headers are the tender part."""
    value = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        end = min(len(value), data.draw(st.sampled_from([200, 5000, len(content)])))
        at = data.draw(st.integers(0, max(end - 1, 0)))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "delete"]))
        if change == "set":
            value[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif change == "cut":
            del value[at:]
        elif change == "insert":
            value[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del value[at : at + data.draw(st.integers(1, 8))]
    return bytes(value)


def other_value(content: bytes, data: Any) -> bytes:
    """JSON with one entry replaced by any value, or taken out; one level down where there is one."""
    whole = json.loads(content)
    place = whole
    key = data.draw(st.sampled_from(sorted(place)))
    if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    anything = st.recursive(
        leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=3)
    )
    if data.draw(st.booleans()):
        place[key] = data.draw(anything)
    else:
        del place[key]
    return json.dumps(whole).encode()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_adapters_load_or_are_refused(good: Good, tmp_path: Path, data: Any) -> None:
    """An adapter that loads into a model and goes out again, or one sentence; never another error."""
    kind = data.draw(st.sampled_from(["own", "peft"]))
    files = dict(good.files[kind])
    config = "adapter.json" if kind == "own" else "adapter_config.json"
    if data.draw(st.booleans()):
        files[config] = other_value(files[config], data)
    else:
        name = data.draw(st.sampled_from(sorted(files)))
        files[name] = mutated(files[name], data)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        for file, value in files.items():
            Path(folder, file).write_bytes(value)
        for use in (
            lambda: load_lora(good.model, folder),
            lambda: export_lora(folder, Path(folder, "lora")),
            lambda: export_peft(folder, Path(folder, "for-peft")),
        ):
            try:
                use()
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 600


# ---- through the entry points ----


def test_a_run_is_evaluated_exported_and_trained_on(
    entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Train; then `--do_eval` alone from each route gives the metrics of training; then go on with another head."""
    import export_adapter

    usual = {
        "model_name_or_path": tiny_model_dir, "dataset_name": mrpc_dir, "max_seq_length": 32, "report_to": "none",
        "disable_tqdm": True, "per_device_train_batch_size": 16, "learning_rate": 0.01, "overwrite_output_dir": True,
    }  # fmt: skip
    methods = {
        "AdaLoRA": {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_type": "svd", "apply_adalora": True,
                    "target_rank": 2, "mask_interval": 1, "final_warmup": 1},
        "SoRA": {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "train_sparse": True, "sparse_lambda_2": 0.2},
        "RM-LoRA": {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_type": "v1", "random_rank": 2},
    }  # fmt: skip

    def call(method: str, out: str, **flags: Any) -> dict[str, Any]:
        flags = usual | flags | {"output_dir": tmp_path / out}
        given = {name: value for name, value in flags.items() if value is not None}
        return entry_point(method).main([str(x) for name, value in given.items() for x in (f"--{name}", value)])

    for method, flags in methods.items():
        run = tmp_path / method
        trained = call(method, method, **flags, do_train=True, do_eval=True, max_steps=4, save_strategy="no")
        assert any(run.glob("tokenizer*")) and "Made from run.json" in (run / "README.md").read_text()
        for to in ("lora", "peft", "merged"):
            out = export_adapter.main([str(run), "--to", to])
            loaded = {"model_name_or_path": out} if to == "merged" else flags | {"lora_path": out}
            got = call(method, f"eval-{to}", **loaded, do_eval=True)
            for key in ("eval_loss", "eval_accuracy", "eval_f1"):
                assert got[key] == pytest.approx(trained[key], abs=1e-5)
        assert not list(run.rglob("pytorch_model*")) and not list(run.rglob("model*.safetensors"))
    three = tmp_path / "three.csv"
    three.write_text("sentence,label\n" + "".join(f"word {i},{'abc'[i % 3]}\n" for i in range(12)))
    caplog.clear()
    call("RM-LoRA", "on", **methods["RM-LoRA"], lora_path=tmp_path / "RM-LoRA", do_train=True, max_steps=1,
         dataset_name=None, train_file=three, validation_file=three, do_eval=True)  # fmt: skip
    assert "start anew: classifier.weight, classifier.bias" in caplog.text
    with pytest.raises(InputError, match="fully fine-tuned"):
        export_adapter.main([str(tmp_path / "RM-LoRA-merged"), "--to", "peft"])


def test_the_best_checkpoint_comes_back_exactly(
    entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    for method, flags in (
        ("AdaLoRA", "--lora_type svd --apply_adalora --target_rank 1 --mask_interval 1"),
        ("SoRA", "--train_sparse --sparse_lambda_2 0.1"),
    ):
        run = tmp_path / method
        entry_point(method).main(
            f"{flags} --model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --max_seq_length 32 "
            "--report_to none --disable_tqdm True --apply_lora --lora_r 2 --lora_alpha 4 --do_train --do_eval "
            "--max_steps 6 --eval_steps 1 --learning_rate 0.3 --eval_strategy steps --save_strategy steps "
            "--save_steps 1 --load_best_model_at_end --metric_for_best_model loss --greater_is_better True "
            f"--output_dir {run}".split()
        )
        best = Path(json.loads((run / "trainer_state.json").read_text())["best_model_checkpoint"])
        final, kept, last = (load_file(f / "adapter.safetensors") for f in (run, best, run / "checkpoint-6"))
        assert best.name != "checkpoint-6" and any(not torch.equal(last[k], kept[k]) for k in kept)
        assert final.keys() == kept.keys() and all(torch.equal(final[k], kept[k]) for k in final)
        assert json.loads((run / "adapter.json").read_text())["ranks"] == ranks_of(final)
        assert not [p for p in best.iterdir() if p.name.startswith(("model", "tokenizer", "training_args"))]


def ranks_of(state: dict[str, Tensor]) -> dict[str, int]:
    found = {}
    for key, value in state.items():
        if key.endswith(("lora_E", "lora_gate")):
            found[key.rpartition(".")[0]] = int(value.count_nonzero())
    return found


# ---- the script, and base models that are not there ----


def test_a_base_that_moved_is_found_by_its_flag_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    import export_adapter

    base, run = make_base(tmp_path / "base", "bert"), tmp_path / "run"
    trained = make_run(run, base, "adalora")
    base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"base model .*base of .*run is not there: .*--base"):
        export_merged(run, tmp_path / "merged")
    out = export_adapter.main([str(run), "--to", "merged", "--base", str(tmp_path / "moved")])
    assert out == tmp_path / "run-merged"
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert (logits(merged) - logits(trained)).abs().max() < 1e-5
    assert len(BertTokenizer.from_pretrained(out)) == 15
    small = tmp_path / "small"
    AutoModel.from_config(BertConfig(**(SIZE | {"intermediate_size": 20}))).save_pretrained(small)
    with pytest.raises(InputError, match=r"small does not fit .*intermediate\.dense.*\(20.*\(40"):
        export_merged(run, tmp_path / "again", str(small))
    other = make_base(tmp_path / "other", "roberta")  # same shapes under the same names
    with pytest.raises(InputError, match=r"weights of the base model .*other are not those"):
        export_merged(run, tmp_path / "again", str(other))
    half = tmp_path / "half"  # a copy in half precision is the same model
    AutoModel.from_pretrained(tmp_path / "moved").to(torch.bfloat16).save_pretrained(half)
    export_merged(run, tmp_path / "from-half", str(half))
    model = load_base(other, 3)
    adapt(model, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
    with pytest.raises(InputError, match="adapts 'bert"):
        load_lora(model, run)
    torch.manual_seed(99)
    config = AutoConfig.from_pretrained(tmp_path / "moved", num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    adapt(model, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
    assert any("another pretrained model" in line for line in load_lora(model, run))
    file = run / "adapter.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "base_model"}))
    with pytest.raises(InputError, match=r"names no base_model: give it by --base"):
        export_merged(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_file_beside_its_config_stands_for_the_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    export_peft(tmp_path / "run", tmp_path / "peft")
    for file in ("run/adapter.safetensors", "peft/adapter_model.safetensors"):
        assert set(read_adapter(tmp_path / file).scaling.values()) == {3.0}
    (tmp_path / "run" / "adapter.json").rename(tmp_path / "adapter.json")
    assert read_adapter(tmp_path / "run" / "adapter.safetensors").scaling == {}


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere", "--to", "peft"], r"nowhere is not a folder"),
        ([".", "--to", "lora"], r"holds no adapter\.json"),
        (["run", "--to", "peft", "--layer", "x.py:X"], r"--layer is for --to merged"),
        (["run", "--to", "merged", "--layer", "x.py:X"], r"--layer x\.py:X names no file"),
        (["run", "--to", "merged", "--layer", "own.py:Other"], r"own\.py has no layer class 'Other'"),
        (["run", "--to", "merged", "--layer", "own.py:Path"], r"own\.py has no layer class 'Path'"),
    ],
)
def test_what_the_script_refuses(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import export_adapter

    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("from pathlib import Path\n")
    with pytest.raises(InputError, match=said):
        export_adapter.main(words)
