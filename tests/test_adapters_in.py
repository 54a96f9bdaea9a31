"""Adapters come in: into runs of other settings, from PEFT's folders, and from state dicts of the released code."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_runs import SIZE, R, load_base, logits, make_base, make_run
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
)

from loralib.adapt import ROLES, adapt, adapted_layers
from loralib.adapters.peft import export_peft
from loralib.adapters.start import load_lora, read_adapter
from loralib.errors import InputError
from loralib.layers import GatedLinear, LoRALinear, SVDLinear


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


def test_a_differing_head_starts_over_and_is_named(tmp_path: Path) -> None:
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


def test_a_file_beside_its_config_stands_for_the_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    export_peft(tmp_path / "run", tmp_path / "peft")
    for file in ("run/adapter.safetensors", "peft/adapter_model.safetensors"):
        assert set(read_adapter(tmp_path / file).scaling.values()) == {3.0}
    (tmp_path / "run" / "adapter.json").rename(tmp_path / "adapter.json")
    assert read_adapter(tmp_path / "run" / "adapter.safetensors").scaling == {}
