"""Variants that change the frozen weight, share frozen factors or have two learning rates: against PEFT's own."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import runs
import torch
from adapter_runs import facts, load_base, logits, make_base
from peft.optimizers import create_loraplus_optimizer
from test_library import ALPHA, MODULES, R, arguments, bert, in_our_names, peft_lora, put, trained
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

import loralib
from loralib import InputError, load
from loralib.adapt import adapt, adapted_layers, parameters
from loralib.adapters.start import load_lora
from loralib.glue.arguments import GlueTrainingArguments
from loralib.layers import LoRALinear
from loralib.training.trainer import LoRATrainer

VARIANTS = Path(__file__).resolve().parent / "variants"


@pytest.fixture(scope="module")
def variant() -> Iterator[Callable[[str], Any]]:
    """variant(name): the module of a file in tests/variants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(VARIANTS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "bert")


def moved(model: nn.Module) -> nn.Module:
    """Every trained parameter a little away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model.eval()


# ---- PiSSA ----


def test_pissa_is_pefts(variant: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 12)
    x = torch.randn(5, 24)
    plain, wrapped = linear(x), nn.Sequential(nn.Linear(24, 12))
    wrapped.load_state_dict({f"0.{key}": value.clone() for key, value in linear.state_dict().items()})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(wrapped, config)
    twin = theirs.base_model.model[0]
    layer = variant("pissa").PiSSALinear(linear, r=4, lora_alpha=8)
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.weight, twin.get_base_layer().weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.delta_weight(), twin.get_delta_weight("default"), rtol=0, atol=1e-5)
    # each triplet has a sign of its own
    torch.testing.assert_close(layer.lora_A.abs(), twin.lora_A["default"].weight.abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.lora_B.abs(), twin.lora_B["default"].weight.abs(), rtol=0, atol=1e-5)


def pissa_run(variant: Callable[[str], Any], base: Path, folder: Path) -> nn.Module:
    model = load_base(base, 3)
    fresh = logits(model)
    adapt(model, variant("pissa").PiSSALinear, MODULES, r=4, lora_alpha=12.0)
    torch.testing.assert_close(logits(model.eval()), fresh, rtol=0, atol=1e-5)
    moved(model)
    loralib.save_adapter(model, folder, facts(base, "pissa"))
    model.config.save_pretrained(folder)
    return model


def test_pissa_is_loaded_merged_and_exported_on_the_bases_own_weight(
    variant: Callable[[str], Any], base: Path, tmp_path: Path
) -> None:
    model = pissa_run(variant, base, tmp_path / "run")
    wanted, kind = logits(model), variant("pissa").PiSSALinear
    assert (wanted - logits(load_base(base, 3))).abs().max() > 1e-2
    same, _ = load(tmp_path / "run", layer=kind)
    assert torch.equal(logits(same), wanted)
    loralib.export_peft(tmp_path / "run", tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(load_base(base, 3), str(tmp_path / "peft")).eval()
    assert next(m.r["default"] for m in theirs.modules() if hasattr(m, "lora_A")) == 8
    loralib.export_merged(tmp_path / "run", tmp_path / "merged")
    loralib.export_merged(tmp_path / "run", tmp_path / "merged-by-class", layer=kind)
    loralib.export_lora(tmp_path / "run", tmp_path / "lora")
    found = [theirs, load(tmp_path / "run")[0], load(tmp_path / "lora")[0], load(tmp_path / "peft")[0]]
    found += [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / n).eval() for n in ("merged", "merged-by-class")
    ]
    for one in found:
        torch.testing.assert_close(logits(one), wanted, rtol=0, atol=1e-5)
    loralib.merge(model)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_a_start_of_other_values_moves_the_frozen_weight(
    variant: Callable[[str], Any], base: Path, tmp_path: Path
) -> None:
    """The singular vectors of another machine, an adapter that knows no start, and one of a lower rank."""
    model, kind = pissa_run(variant, base, tmp_path / "run"), variant("pissa").PiSSALinear

    class Other(kind):  # type: ignore[misc, valid-type]
        def reset_lora_parameters(self) -> None:
            super().reset_lora_parameters()
            with torch.no_grad():
                self.weight += self.delta_weight()
                self.lora_B *= 1.5
                self.weight -= self.delta_weight()

    other = load_base(base, 3)
    adapt(other, Other, MODULES, r=4, lora_alpha=12.0)
    loralib.load_adapter(other, tmp_path / "run")
    torch.testing.assert_close(logits(other.eval()), logits(model), rtol=0, atol=1e-5)
    for r, alpha in ((4, 12.0), (6, 12.0)):  # with 6 another scaling, too
        higher = load_base(base, 3)
        adapt(higher, kind, MODULES, r=r, lora_alpha=alpha)
        load_lora(higher, tmp_path / "run")
        torch.testing.assert_close(logits(higher.eval()), logits(model), rtol=0, atol=1e-4)
    plain = load_base(base, 3)
    adapt(plain, LoRALinear, MODULES, r=2, lora_alpha=12.0)
    loralib.save_adapter(moved(plain), tmp_path / "plain", facts(base))
    taken = load_base(base, 3)
    adapt(taken, kind, MODULES, r=4, lora_alpha=12.0)
    load_lora(taken, tmp_path / "plain")
    torch.testing.assert_close(logits(taken.eval()), logits(plain), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="lora_A_start.*which the layer LoRALinear of this run lacks"):
        load_lora(adapted(base, LoRALinear), tmp_path / "run")


def adapted(base: Path, kind: type[LoRALinear]) -> nn.Module:
    model = load_base(base, 3)
    adapt(model, kind, MODULES, r=4, lora_alpha=12.0)
    return model


@pytest.mark.parametrize("name", ["pissa", "vera"])
def test_a_resumed_run_is_the_straight_one(variant: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    kind = variant(name).PiSSALinear if name == "pissa" else variant(name).VeRALinear

    def run(folder: Path, resume: str | None = None) -> nn.Module:
        model = bert(torch.float32)
        torch.manual_seed(4)
        adapt(model, kind, MODULES, r=R, lora_alpha=ALPHA)
        changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "lr_scheduler_type": "constant"}
        args = arguments(folder, GlueTrainingArguments, **changes)
        parts = {"args": args, "train_dataset": runs.rows(80), "data_collator": runs.Padder()}
        trainer = LoRATrainer(model=model, adapter={"method": name}, **parts)
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-3")).state_dict()
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed[key]), key


def test_any_other_change_of_the_weight_is_refused_where_no_layer_is_known(base: Path, tmp_path: Path) -> None:
    class Halved(LoRALinear):
        def reset_lora_parameters(self) -> None:
            super().reset_lora_parameters()
            with torch.no_grad():
                self.weight *= 0.5

    model = moved(adapted(base, Halved))
    loralib.save_adapter(model, tmp_path / "run", facts(base, "halved"))
    model.config.save_pretrained(tmp_path / "run")
    for route in (loralib.export_peft, loralib.export_merged):
        with pytest.raises(InputError, match="changes the frozen weight"):
            route(tmp_path / "run", tmp_path / "out")
    loralib.export_merged(tmp_path / "run", tmp_path / "out", layer=Halved)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)


# ---- VeRA ----


def test_vera_is_pefts(variant: Callable[[str], Any], base: Path) -> None:
    """Outputs and gradients; PEFT's A and B for all layers, of which each takes its first columns and rows."""
    ours = adapted(base, variant("vera").VeRALinear)
    config = peft.VeraConfig(r=4, target_modules=r".*(query|value|\d\.output\.dense)", modules_to_save=["pooler"])
    theirs = peft.get_peft_model(load_base(base, 3), config)
    ids = {"input_ids": torch.arange(36).view(3, 12), "labels": torch.tensor([0, 1, 2])}
    pairs = []
    with torch.no_grad():
        twins = [m for m in theirs.modules() if type(m).__name__ == "Linear" and hasattr(m, "vera_lambda_d")]
        layers = [layer for _, layer in adapted_layers(ours)]
        assert len(twins) == len(layers) == 6
        for layer, twin in zip(layers, twins, strict=True):
            layer.lora_A.copy_(twin.vera_A["default"][:, : layer.in_features])
            layer.lora_B.copy_(twin.vera_B["default"][: layer.out_features])
            assert torch.equal(layer.lora_d, twin.vera_lambda_d["default"])
            layer.lora_vector.normal_()
            twin.vera_lambda_b["default"].copy_(layer.lora_vector)
            pairs += [(layer.lora_d, twin.vera_lambda_d["default"]), (layer.lora_vector, twin.vera_lambda_b["default"])]
            torch.testing.assert_close(layer.delta_weight(), twin.get_delta_weight("default"))
    outputs = [model.eval()(**ids) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_vera_counts_saves_loads_and_merges(variant: Callable[[str], Any], base: Path, tmp_path: Path) -> None:
    kind = variant("vera").VeRALinear
    model = moved(adapted(base, kind))
    counts = parameters(model)
    # hidden 24, intermediate 40: query and value are 24 x 24, the layer's output 40 -> 24; two layers
    trains = 2 * 3 * (4 + 24)
    assert counts["lora"] == counts["remaining"] == trains and counts["trainable"] == trains + counts["head"]
    assert counts["frozen"] == 4 * (24 + 40) + 24 * 4
    assert all(m["trainable"] == m["remaining"] == 28 for m in counts["modules"].values())
    assert "frozen" not in parameters(adapted(base, LoRALinear))
    with pytest.raises(InputError, match="factors of bert.* are frozen: RM-LoRA masks gradients"):
        loralib.rm_lora(model, random_rank=2)
    loralib.save_adapter(model, tmp_path / "run", facts(base, "vera"))
    model.config.save_pretrained(tmp_path / "run")
    loaded, _ = load(tmp_path / "run", layer=kind)
    assert torch.equal(logits(loaded), logits(model))
    assert len({id(layer.lora_B) for _, layer in adapted_layers(loaded)}) == 1
    started = adapted(base, kind)
    load_lora(started, tmp_path / "run")
    assert torch.equal(logits(started.eval()), logits(model))
    loralib.export_merged(tmp_path / "run", tmp_path / "merged", layer=kind)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="cannot be written as plain LoRA"):
        loralib.export_peft(tmp_path / "run", tmp_path / "peft")


# ---- LoRA+ ----


def test_lora_plus_is_pefts(variant: Callable[[str], Any]) -> None:
    """Five steps in float64 from the same values."""
    own = bert()
    adapt(own, LoRALinear, MODULES, r=R, lora_alpha=ALPHA)
    theirs = peft_lora(bert())
    put(trained(own), theirs)
    args = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8)
    stock: Any = Trainer.__new__(Trainer)
    parts = SimpleNamespace(args=args, model=own, get_decay_parameter_names=stock.get_decay_parameter_names)
    ours = variant("loraplus").two_rates(16.0, parts)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    batch = {"input_ids": torch.arange(24).view(3, 8), "labels": torch.tensor([0, 1, 1])}
    for _ in range(5):
        for model, optimizer in ((own, ours), (theirs, reference)):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = in_our_names(theirs)
    assert max((p - found[name]).abs().max().item() for name, p in trained(own).items()) <= 1e-12


def test_lora_plus_runs_on_glue(
    variant: Callable[[str], Any], tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    argv = f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --lora_r 2 --lora_alpha 8 --do_train "
    argv += f"--max_steps 2 --max_seq_length 16 --output_dir {tmp_path} --use_cpu --report_to none --rate_ratio 4"
    variant("loraplus_glue").main(argv.split())
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["method"] == "loraplus" and run["arguments"]["rate_ratio"] == 4
