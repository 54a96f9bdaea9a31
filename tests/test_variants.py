"""The worked variants of docs/variant.md against PEFT's own, and through the GLUE run, the report and the exports."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from loralib.adapt import adapt, adapted_layers
from loralib.adapters.own import load_adapter
from loralib.errors import InputError
from loralib.layers import LoRALinear
from loralib.trainer import LoRATrainer

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ROOT / "tests" / "variants"


@pytest.fixture(scope="module")
def variant() -> Iterator[Callable[[str], Any]]:
    """variant(name): the module of a file in tests/variants, imported as `python FILE` finds it."""
    sys.path.insert(0, str(VARIANTS))
    yield importlib.import_module
    sys.path.remove(str(VARIANTS))


def test_each_variant_is_a_file_of_at_most_forty_lines() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in VARIANTS.glob("*.py")}
    assert sizes.pop("peft_glue.py") <= 60  # three methods of PEFT
    assert sizes and max(sizes.values()) <= 40, sizes


def _peft_twin(layer: LoRALinear, **kind: bool) -> tuple[nn.Module, nn.Module]:
    """A PEFT model of one linear layer with the same weights as `layer`, and PEFT's own adapted layer in it."""
    base = nn.Sequential(nn.Linear(layer.in_features, layer.out_features))
    base[0].weight, base[0].bias = (
        nn.Parameter(layer.weight.detach().clone()),
        nn.Parameter(layer.bias.detach().clone()),
    )
    config = peft.LoraConfig(r=layer.r, lora_alpha=layer.lora_alpha, target_modules=["0"], **kind)
    model = peft.get_peft_model(base, config)
    twin = model.base_model.model[0]
    with torch.no_grad():
        twin.lora_A["default"].weight.copy_(layer.lora_A)
        twin.lora_B["default"].weight.copy_(layer.lora_B)
    return model, twin


def _trained_like(layer: LoRALinear) -> None:
    """Factors away from their start, so that the product is not zero."""
    with torch.no_grad():
        layer.lora_A.normal_(std=0.3)
        layer.lora_B.normal_(std=0.3)


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("r", [1, 4, 8])
def test_rank_stabilised_scaling_equals_peft(variant: Callable[[str], Any], r: int) -> None:
    layer = variant("rslora").RSLoRALinear(nn.Linear(24, 12), r=r, lora_alpha=16)
    _trained_like(layer)
    model, twin = _peft_twin(layer, use_rslora=True)
    x = torch.randn(3, 5, 24)
    ours, theirs = layer(x), model(x)
    _close(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    _close(layer.lora_A.grad, twin.lora_A["default"].weight.grad)
    _close(layer.lora_B.grad, twin.lora_B["default"].weight.grad)
    model.merge_and_unload()
    _close(layer.weight + layer.delta_weight(), twin.get_base_layer().weight)


@pytest.mark.parametrize("r", [1, 4, 8])
def test_dora_equals_peft(variant: Callable[[str], Any], r: int) -> None:
    linear = nn.Linear(24, 12)
    layer = variant("dora").DoRALinear(linear, r=r, lora_alpha=16)
    x = torch.randn(3, 5, 24)
    _close(layer(x), nn.functional.linear(x, linear.weight, linear.bias))  # fresh: the layer that it replaces
    _trained_like(layer)
    model, twin = _peft_twin(layer, use_dora=True)
    with torch.no_grad():
        layer.lora_magnitude.mul_(torch.rand(12) + 0.5)
        twin.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude)
    ours, theirs = layer(x), model(x)
    _close(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    _close(layer.lora_A.grad, twin.lora_A["default"].weight.grad)
    _close(layer.lora_B.grad, twin.lora_B["default"].weight.grad)
    _close(layer.lora_magnitude.grad, twin.lora_magnitude_vector["default"].weight.grad)
    model.merge_and_unload()
    _close(layer.weight + layer.delta_weight(), twin.get_base_layer().weight)


def _flags(model: Path, data: Path, out: Path) -> list[str]:
    return (
        f"--model_name_or_path {model} --dataset_name {data} --output_dir {out} --apply_lora --lora_r 4 --lora_alpha 8 "
        "--do_train --do_eval --max_steps 3 --per_device_train_batch_size 8 --max_seq_length 32 --learning_rate 1e-2 "
        "--report_to none --logging_steps 1 --save_strategy no --use_cpu --disable_tqdm True"
    ).split()


@pytest.mark.parametrize("name", ["rslora", "dora_glue"])
def test_a_variant_runs_on_glue(
    variant: Callable[[str], Any], name: str, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    own = ["--length_coef", "0.1"] if name == "dora_glue" else []
    metrics = variant(name).main([*_flags(tiny_model_dir, mrpc_dir, tmp_path), *own])
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "finished" and run["method"] == name.removesuffix("_glue")
    assert run["metrics"]["eval_accuracy"] == metrics["eval_accuracy"]
    saved = load_file(tmp_path / "adapter.safetensors")
    magnitudes = [key for key in saved if key.endswith("lora_magnitude")]
    assert any(saved[key].any() for key in saved if key.endswith("lora_B"))
    if own:
        assert len(magnitudes) == len(run["parameters"]["modules"]) == 6
        assert run["length_change"] > 0
        logged = [entry for entry in run["history"] if "penalty" in entry]
        assert logged and all(e["loss"] == pytest.approx(e["task_loss"] + 0.1 * e["penalty"]) for e in logged)
    else:
        assert not magnitudes

    again = [f for f in _flags(tiny_model_dir, mrpc_dir, tmp_path / "again") if f != "--do_train"]
    evaluated = variant(name).main([*again, "--lora_path", str(tmp_path)])
    assert evaluated["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("name", ["rslora", "dora_glue"])
def test_an_entry_point_written_after_an_earlier_page_runs_unchanged(
    variant: Callable[[str], Any], name: str, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    """The files as they stood at commit 409de3b, when the steps of `flow` had other names."""
    spec = importlib.util.spec_from_file_location(f"old_{name}", ROOT / "tests" / "fixtures" / "409de3b" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    old = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = old  # dataclasses look their module up
    spec.loader.exec_module(old)
    before = old.main(_flags(tiny_model_dir, mrpc_dir, tmp_path / "old"))
    now = variant(name).main(_flags(tiny_model_dir, mrpc_dir, tmp_path / "now"))
    assert before["eval_loss"] == now["eval_loss"] and before["train_loss"] == now["train_loss"]


@pytest.mark.parametrize("kind", ["lora", "adalora", "dora"])
def test_methods_of_peft_are_peers_in_the_report(
    variant: Callable[[str], Any], kind: str, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    """Trained by the same steps, counted as PEFT counts, and PEFT's AdaLoRA ends at its budget with its own penalty."""
    flags = [*_flags(tiny_model_dir, mrpc_dir, tmp_path), "--peft", kind, "--max_steps", "6"]
    adalora = "--target_rank 2 --init_warmup 1 --final_warmup 2 --mask_interval 1 --reg_orth_coef 0.25".split()
    metrics = variant("peft_glue").main([*flags, *(adalora if kind == "adalora" else [])])
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["method"] == f"peft-{kind}" and record["metrics"]["eval_accuracy"] == metrics["eval_accuracy"]
    saved = load_file(tmp_path / "model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=2)
    head = sum(p.numel() for name, p in model.named_parameters() if re.match("classifier|pooler", name))
    trained = [name for name in saved if re.search(r"lora_(A|B|E|magnitude)", name)]
    size = sum(saved[name].numel() for name in trained)
    counts = record["parameters"]
    assert (counts["lora"], counts["head"], counts["trainable"]) == (size, head, size + head)
    assert any(saved[name].any() for name in trained if "lora_B" in name)
    if kind == "adalora":
        left = sum(int(saved[name].count_nonzero()) for name in trained if "lora_E" in name)
        assert left == 2 * 6  # of 4 in each of the six matrices
        logged = [entry for entry in record["history"] if "penalty" in entry]
        assert logged and all(e["loss"] == pytest.approx(e["task_loss"] + 0.25 * e["penalty"]) for e in logged)
        with pytest.raises(InputError, match=r"init_warmup 9 \+ final_warmup 2 must stay below the total of 6"):
            variant("peft_glue").main([*flags, *adalora, "--init_warmup", "9", "--output_dir", f"{tmp_path}-2"])


@pytest.mark.parametrize("step", [3, 5])
def test_adalora_of_peft_resumes_exactly(
    variant: Callable[[str], Any], step: int, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    """PEFT's checkpoints hold neither the importances (step 3) nor the ranks of the final phase (step 5)."""
    adalora = "--peft adalora --target_rank 2 --init_warmup 1 --final_warmup 2 --mask_interval 1 --max_steps 6".split()

    def weights(folder: Path) -> dict[str, Any]:
        flags = [*_flags(tiny_model_dir, mrpc_dir, folder), *adalora, "--save_strategy", "steps", "--save_steps", "1"]
        variant("peft_glue").main(flags)
        return load_file(folder / "model.safetensors")

    straight = weights(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    resumed = weights(tmp_path / "cut")
    assert straight.keys() == resumed.keys() and all(torch.equal(t, resumed[name]) for name, t in straight.items())


def test_own_loop_trains_saves_and_merges(variant: Callable[[str], Any], tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))

    model = network()
    x = torch.randn(64, 12)
    labels = x[:, :3].argmax(1)
    before = nn.functional.cross_entropy(model(x), labels).item()
    variant("own_loop").train(model, [(x, labels)] * 60, str(tmp_path))
    assert nn.functional.cross_entropy(model(x), labels).item() < 0.7 * before
    assert not list(adapted_layers(model)) and model.state_dict().keys() == network().state_dict().keys()

    again = network()  # the base, then the saved adapter
    adapt(again, LoRALinear, ["all-linear"], r=4, lora_alpha=8)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), model(x))


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_variants_are_exported(
    variant: Callable[[str], Any], tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rsLoRA to PEFT, DoRA (whose update is not a product of two factors) merged: the logits of the trained model."""
    import export_adapter

    trained = {}
    train = LoRATrainer.train

    def watched(self: LoRATrainer, *args: Any, **kwargs: Any) -> Any:
        trained["model"] = self.model
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LoRATrainer, "train", watched)
    ids = torch.randint(5, 50, (4, 12))
    for name in ("rslora", "dora_glue"):
        run = tmp_path / name
        variant(name).main(_flags(tiny_model_dir, mrpc_dir, run))
        expected = _logits(trained["model"], ids)
        if name == "rslora":
            out = export_adapter.main([str(run), "--to", "peft"])
            base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, dtype=torch.float32, num_labels=2)
            got = peft.PeftModel.from_pretrained(base, out)
        else:
            with pytest.raises(InputError, match="--to merged --layer"):
                export_adapter.main([str(run), "--to", "peft"])
            layer = f"{VARIANTS / 'dora.py'}:DoRALinear"
            out = export_adapter.main([str(run), "--to", "merged", "--layer", layer])
            got = AutoModelForSequenceClassification.from_pretrained(out)
        _close(_logits(got, ids), expected)


def test_a_variant_is_a_method_of_scripts_and_report(
    variant: Callable[[str], Any], tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of scripts/mrpc.sh PATH, run twice with different seeds; the report has a row for the variant."""
    import report

    place = {"MODEL": str(tiny_model_dir), "DATA": str(mrpc_dir), "OUTPUT": str(tmp_path), "PYTHON": sys.executable}
    own = "--apply_lora --lora_r 4 --lora_alpha 8 --max_steps 2 --max_seq_length 32 --report_to none --use_cpu"
    for seed in ("1", "2"):
        call = ["bash", str(ROOT / "scripts" / "mrpc.sh"), str(VARIANTS / "rslora.py"), *own.split()]
        environment = os.environ | place | {"SEED": seed, "DRY_RUN": "1", "NPROC": "1"}
        said = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
        python, file, *argv = shlex.split(said.strip().splitlines()[-1])
        assert (python, file) == (sys.executable, str(VARIANTS / "rslora.py"))
        monkeypatch.setattr(sys, "argv", [file, *argv])
        variant("rslora").main()
    report.main([str(tmp_path), "--out", str(tmp_path / "report")])
    assert re.search(r"^\| rslora \| .*\(n=2\) \|$", (tmp_path / "report" / "report.md").read_text(), flags=re.M)
