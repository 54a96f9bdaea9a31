"""The programs of docs/library.md and of the README's first screen, run as they are shown."""

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from adapter_runs import logits, make_base
from peft import PeftModel
from test_library import arguments
from test_trl import arguments as sft_arguments
from test_trl import data as sft_data  # noqa: F401
from test_trl import decoder
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

import loralib
from loralib.adapt import adapted_layers

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted((ROOT / "tests" / "library").glob("*.py"))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """program(name): the module of tests/library."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "library"))
    return importlib.import_module


@pytest.fixture(autouse=True)
def no_accelerator_stays() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def model(tmp_path: Path) -> Any:
    base = make_base(tmp_path / "base", "bert")
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)


def rows() -> list[dict[str, Any]]:
    """Ids within the vocabulary of the tiny models."""
    return [row | {"input_ids": [i % 60 for i in row["input_ids"]]} for row in runs.rows(64)]


def stock(folder: Path) -> dict[str, Any]:
    args = arguments(folder, max_steps=8, logging_steps=8)
    return {"args": args, "train_dataset": rows(), "data_collator": runs.Padder()}


def test_the_page_shows_the_programs_each_of_25_lines_at_most() -> None:
    shown = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(), flags=re.M | re.S)
    assert sorted(block.strip() for block in shown) == sorted(path.read_text().strip() for path in PROGRAMS)
    for path in PROGRAMS:
        assert len(path.read_text().splitlines()) <= 25, path.name


def test_stock_trainer_and_labels(program: Any, model: Any, tmp_path: Path) -> None:
    method = program("stock_trainer").train(model, **stock(tmp_path / "out"))
    assert method.facts()["total_rank"] == method.facts()["target_total_rank"] == 8
    found, _ = loralib.load(tmp_path / "out")
    assert torch.equal(logits(found), logits(model.eval()))
    names = program("labels").label(str(tmp_path / "out"), ["a b c", ("d", "e")][:1])
    assert names[0] in ("LABEL_0", "LABEL_1")


def test_sft_trainer(program: Any, sft_data: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    before = decoder().state_dict()
    model = decoder()
    program("sft_trainer").train(model, sft_arguments(tmp_path), **sft_data)
    assert not list(adapted_layers(model)) and model.state_dict().keys() == before.keys()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if re.search(r"(q|v)_proj\.weight$", key)}
    assert (tmp_path / "model.safetensors").is_file()


def test_peft_model(program: Any, model: Any, tmp_path: Path) -> None:
    adapted = program("peft_model").train(model, **stock(tmp_path / "out")).eval()
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    again = PeftModel.from_pretrained(fresh, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(again), logits(adapted), rtol=0, atol=1e-6)


def test_accelerate_loop_is_a_plain_one(program: Any, model: Any, tmp_path: Path) -> None:
    """Two micro-batches a step: the same as their mean in one backward."""
    batches = [runs.Padder()(rows()[i : i + 4]) for i in range(0, 32, 4)]
    start = {name: copy.deepcopy(m.state_dict()) for name, m in model.named_children()}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(5)
    method = program("accelerate_loop").train(model.eval(), batches_of(batches), accelerator)
    assert method.facts()["total_rank"] == method.facts()["target_total_rank"] == 8
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2).eval()
    for name, child in plain.named_children():
        child.load_state_dict(start[name])
    torch.manual_seed(5)
    wanted = loralib.adalora(plain, ["query", "value"], r=4, lora_alpha=8, target_rank=2, final_warmup=2)
    wanted.begin(4)
    optimizer = wanted.optimizer(lr=1e-2)
    for step in range(4):
        ((plain(**batches[2 * step]).loss + plain(**batches[2 * step + 1]).loss) / 2 + wanted.loss()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        wanted.before_step(step)
        optimizer.step()
        wanted.after_step(step)
        optimizer.zero_grad()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p, dict(model.named_parameters())[name], rtol=0, atol=1e-5)


def test_accelerate_keeps_the_allocator(model: Any, tmp_path: Path) -> None:
    """save_state and load_state, as the page says."""
    accelerator = Accelerator(cpu=True)
    method = loralib.adalora(model, ["query"], r=4, lora_alpha=8, target_rank=2, final_warmup=2)
    accelerator.register_for_checkpointing(*method.state.values())
    method.begin(8)
    for e in method.factors.between:
        nn.init.ones_(e)  # where E is 0, nothing has any importance
    model(**runs.Padder()(rows()[:4])).loss.backward()
    for step in range(8):
        method.after_step(step)
    accelerator.save_state(str(tmp_path / "state"))
    allocator: Any = method.state["allocator"]
    kept = {key: value.clone() for key, value in allocator.state_dict().items()}
    allocator.restart()
    accelerator.load_state(str(tmp_path / "state"))
    assert kept.keys() == allocator.state_dict().keys() and "threshold" in kept
    assert all(torch.equal(value, kept[key]) for key, value in allocator.state_dict().items())
    assert any(value.any() for key, value in kept.items() if key.startswith("importance"))


def batches_of(batches: list[Any]) -> Any:
    return torch.utils.data.DataLoader(batches, batch_size=None)


def test_plain_loop(program: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x, labels = torch.randn(48, 6), torch.arange(48) % 3
    before = nn.functional.cross_entropy(model(x), labels).item()
    program("plain_loop").train(model, [(x, labels)] * 40)
    assert nn.functional.cross_entropy(model(x), labels).item() < before - 0.1


def test_the_readmes_first_program(model: Any, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("```python") < text.index("## Start")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)[:1]
    args = arguments(tmp_path / "out", max_steps=2, per_device_train_batch_size=1)
    fixed = [{**row, "input_ids": row["input_ids"][:5], "attention_mask": [1] * 5} for row in rows()]
    names = {"model": model, "args": args, "rows": fixed, "Trainer": Trainer}
    exec(block, names)
    assert any(layer.lora_B.any() for _, layer in adapted_layers(model))
    assert names["method"].name == "rm-lora-v1"
