"""Rows of docs/ledger.md that no other test holds: what trains, groups of the optimizer, steps, counts, warnings."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_runs import V3
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    TrainerCallback,
)

from loralib.adapt import adapt, adapted_layers, factors, parameters
from loralib.glue import flow
from loralib.glue.arguments import GlueTrainingArguments
from loralib.layers import GatedLinear, LoRALinear, SVDLinear
from loralib.methods import sora
from loralib.trainer import LoRATrainer


class Classifier(nn.Module):
    """A body that is adapted and a head that trains; forward takes rows (batch, 6); the trainer computes the loss."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(x))}


def _rows(n: int) -> list[dict[str, Any]]:
    x = torch.randn(n, 6)
    return [{"x": row, "labels": int(row.sum() > 0)} for row in x]


def _trainer(
    model: nn.Module, rows: list[dict[str, Any]], folder: Path, flags: dict[str, Any], **parts: Any
) -> LoRATrainer:
    usual = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "num_train_epochs": 1}
    usual |= {
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    args = GlueTrainingArguments(output_dir=str(folder), **(usual | flags))
    return LoRATrainer(model=model, args=args, train_dataset=rows, **parts)


def test_pooler_inside_the_backbone_is_head() -> None:
    """L1: BERT's pooler trains, its embeddings and encoder do not."""
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config)
    adapt(model, LoRALinear, ["query"], r=2, lora_alpha=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    query = "bert.encoder.layer.0.attention.self.query"
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trained == {f"{query}.lora_A", f"{query}.lora_B", "classifier.weight", "classifier.bias", *pooler}


def test_penalty_of_weight_zero_is_not_computed(tmp_path: Path) -> None:
    """L7."""

    def forbidden() -> Tensor:
        raise AssertionError("the penalty was computed")

    model = Classifier()
    adapt(model, SVDLinear, ["all-linear"], r=2, lora_alpha=2)
    _trainer(model, _rows(8), tmp_path, {}, penalty=forbidden, penalty_coef=0.0).train()
    with pytest.raises(AssertionError, match="the penalty was computed"):
        _trainer(model, _rows(8), tmp_path, {}, penalty=forbidden, penalty_coef=0.1).train()


def _sora(folder: Path, rows: int, **flags: Any) -> LoRATrainer:
    model = Classifier()
    adapt(model, GatedLinear, ["all-linear"], r=2, lora_alpha=2)
    return _trainer(model, _rows(rows), folder, flags, method=sora(model, threshold=0.25, sparse_lr=0.5))


def test_gates_have_a_group_of_their_own(tmp_path: Path) -> None:
    """S3: whatever adam_beta1, adam_beta2, adam_epsilon and weight_decay say."""
    trainer = _sora(tmp_path, 8, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3, weight_decay=0.1, learning_rate=0.1)
    groups = trainer.create_optimizer().param_groups
    own = {id(gate) for gate in factors(trainer.model).between}
    (group,) = [g for g in groups if any(id(p) in own for p in g["params"])]
    assert {id(p) for p in group["params"]} == own
    assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-6 and group["weight_decay"] == 0
    assert group["lr"] == 0.5 and group["threshold"] == 0.25
    others = [g for g in groups if g is not group]
    assert {(g["betas"], g["eps"], g["lr"], g["threshold"]) for g in others} == {((0.5, 0.6), 1e-3, 0.1, 0.0)}
    assert sorted(g["weight_decay"] for g in others) == [0.0, 0.1]
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in trainer.model.parameters())


def test_schedule_of_the_gates_has_the_true_length(tmp_path: Path) -> None:
    """S5: 20 rows, batches of 4, two accumulated: 3 steps; the gates' rate falls from 0.5 to 0 over them."""
    trainer, rates = _sora(tmp_path, 20), []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            rates.append(trainer.optimizer.param_groups[-1]["lr"])

    trainer.add_callback(Watch())
    trainer.train()
    assert trainer.total_steps() == trainer.state.global_step == 3
    assert rates == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])
    assert trainer.optimizer.param_groups[-1]["lr"] == 0


def test_a_short_last_group_steps_and_is_averaged_by_its_length(tmp_path: Path) -> None:
    """G1: micro-batches of 4 from 20 rows, two accumulated: the same as steps on 8, 8 and 4 rows."""
    rows = _rows(20)
    models = [Classifier(), Classifier()]
    models[1].load_state_dict(models[0].state_dict())
    steps = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = _trainer(
        models[0], rows, tmp_path, steps, make_optimizer=lambda t: torch.optim.SGD(t.model.parameters(), lr=0.5)
    )
    trainer.train()
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.5)
    for part in (rows[:8], rows[8:16], rows[16:]):
        logits = models[1](torch.stack([row["x"] for row in part]))["logits"]
        nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in part])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trainer.state.global_step == 3
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("r", "published"), [(2, 0.33e6), (8, 1.33e6)])
def test_published_parameter_counts(r: int, published: float) -> None:
    """D3: six matrices of each of the twelve layers of DeBERTa-v3-base have 165,888 elements for each rank."""
    config = DebertaV2Config(
        vocab_size=128100, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        position_buckets=256, position_biased_input=False, max_relative_positions=-1, pooler_hidden_size=768, **V3,
    )  # fmt: skip
    with torch.device("meta"):
        model = DebertaV2ForSequenceClassification(config)
    six = ["query", "key", "value", "intermediate", "layer.output", "attention.output"]
    assert len(adapt(model, LoRALinear, six, r=r, lora_alpha=r)) == 72
    counts = parameters(model)
    assert counts["lora"] == counts["remaining"] == 165_888 * r
    assert counts["lora"] == sum(p.numel() for _, layer in adapted_layers(model) for p in (layer.lora_A, layer.lora_B))
    assert counts["lora"] == pytest.approx(published, abs=0.005e6)
    assert counts["head"] == 768 * 768 + 768 + 768 * 2 + 2
    assert counts["trainable"] == counts["lora"] + counts["head"]


def test_several_gpus_in_one_process_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """D4: the warning names the effective batch and torchrun."""
    trainer = _trainer(Classifier(), _rows(8), tmp_path, {"per_device_train_batch_size": 32})
    trainer.args._n_gpu = 4
    run: Any = SimpleNamespace(training=trainer.args, clear=False)
    with caplog.at_level(logging.WARNING, logger="loralib"):
        flow.announce(run, trainer, "full", [])
    assert "4 GPUs" in caplog.text and "effective batch is 256" in caplog.text and "torchrun" in caplog.text
