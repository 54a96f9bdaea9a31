"""Methods in other people's programs: the stock Trainer, any subclass of it, and models that PEFT has adapted."""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import runs
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from loralib.errors import InputError
from loralib.methods import Method, adalora, lora, rm_lora, sora
from loralib.peft import peft_factors
from loralib.training.method_callback import MethodCallback
from loralib.training.penalty import WithPenalty
from loralib.training.trainer import LoRATrainer, task_loss

R, ALPHA, MODULES = 4, 8, ["query", "value", "layer.output"]
TARGETS = ["query", "value", "output.dense"]  # what MODULES means, in PEFT's words
HEAD = ["pooler", "classifier"]


class PenaltyTrainer(WithPenalty, Trainer):
    """The mixin on the stock Trainer."""


def bert(dtype: torch.dtype = torch.float64) -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).to(dtype)


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 0.01,
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "warmup_steps": 2,
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "seed": 3,
    }
    return kind(**(usual | changes))


def mean_over_rows(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """LoRATrainer's cross-entropy; the stock Trainer leaves dividing by the rows of a group to such a function."""
    return task_loss(outputs["logits"], labels) * len(labels) / num_items_in_batch


def parts(model: nn.Module, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "args": arguments(folder, **changes),
        "train_dataset": runs.rows(80),
        "data_collator": runs.Padder(),
        "compute_loss_func": mean_over_rows,
    }


def ours(method: Method, folder: Path) -> dict[str, Tensor]:
    """The parameters after LoRATrainer's run."""
    from loralib.glue.arguments import GlueTrainingArguments

    args = arguments(folder, GlueTrainingArguments)
    rows, adapter = runs.rows(80), {"method": method.name}
    LoRATrainer(
        method=method, model=method.model, args=args, train_dataset=rows, data_collator=runs.Padder(), adapter=adapter
    ).train()
    assert method.model is not None
    return {name: p.detach() for name, p in method.model.named_parameters() if p.requires_grad}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)


def in_our_names(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters of a PEFT model by this project's names."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".weight" if "lora_" in name else "")
            found[name.replace(".modules_to_save", "").replace(".default", "")] = p.detach()
    return found


def put(values: dict[str, Tensor], model: nn.Module) -> None:
    own = in_our_names(model)
    assert own.keys() == values.keys()
    for name, value in values.items():
        own[name].copy_(value)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- the stock Trainer and its subclasses ----


def put_in(kind: str, model: nn.Module, penalty: float) -> Method:
    settings: dict[str, Any] = {"r": R, "lora_alpha": ALPHA}
    torch.manual_seed(2)
    if kind == "adalora":
        warm: dict[str, Any] = {"init_warmup": 3, "final_warmup": 5, "mask_interval": 2, "reg_orth_coef": penalty}
        return adalora(model, MODULES, target_rank=2, **warm, **settings)
    if kind == "sora":
        return sora(model, MODULES, threshold=0.02, sparse_lambda=penalty, **settings)
    if kind == "lora":
        return lora(model, MODULES, reg_orth_coef=penalty, **settings)
    return rm_lora(model, MODULES, random_rank=2, version=kind, seed=3, reg_orth_coef=penalty, **settings)


@pytest.mark.parametrize("kind", ["adalora", "sora", "v2"])
def test_a_callback_in_the_stock_trainer_is_lora_trainer(kind: str, tmp_path: Path) -> None:
    """With accumulation and clipping; without a penalty, which a callback cannot add."""
    wanted = ours(put_in(kind, bert(), 0.0), tmp_path)
    method = put_in(kind, bert(), 0.0)
    names = set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), method.model))
    optimizer = method.optimizer(0.01, weight_decay=0.01, decayed=names) if method.own_groups else None
    given = parts(method.model, tmp_path)
    Trainer(callbacks=[MethodCallback(method)], optimizers=(optimizer, None), **given).train()
    assert furthest(trained(method.model), wanted) <= 1e-12
    if kind == "adalora":
        assert method.facts()["total_rank"] == 2 * len(method.factors.names)
    if kind == "sora":
        assert method.facts()["remaining"] < sum(p.numel() for p in (*method.factors.A, *method.factors.B))


def test_an_optimizer_class_counts_without_groups_of_its_own(tmp_path: Path) -> None:
    """The mixin makes the method's optimizer, and the callback refuses another one."""
    for kind in ("mixin", "callback", "given"):
        method = put_in("lora", bert(), 0.0)
        method.optimizer_class = torch.optim.RAdam
        given = parts(method.model, tmp_path / kind)
        if kind == "mixin":
            trainer: Trainer = PenaltyTrainer(method=method, **given)
        else:
            own = method.optimizer(0.01) if kind == "given" else None
            trainer = Trainer(callbacks=[MethodCallback(method)], optimizers=(own, None), **given)
        if kind == "callback":
            with pytest.raises(InputError, match="lora needs an optimizer of its own, RAdam"):
                trainer.train()
        else:
            trainer.train()
            assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)) is torch.optim.RAdam


@pytest.mark.parametrize("kind", ["lora", "adalora", "sora", "v1"])
def test_the_mixin_is_lora_trainer(kind: str, tmp_path: Path) -> None:
    """Penalties enter before clipping, once an accumulation group, and are logged by their name."""
    wanted = ours(put_in(kind, bert(), 0.3), tmp_path)
    method = put_in(kind, bert(), 0.3)
    trainer = PenaltyTrainer(method=method, **parts(method.model, tmp_path))
    trainer.train()
    assert furthest(trained(method.model), wanted) <= 1e-12
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert log["loss"] == pytest.approx(log["task_loss"] + 0.3 * log[method.penalty_name], abs=1e-6)


class Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.at


@pytest.mark.parametrize("kind", ["adalora", "sora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stock_trainer_resumes_bitwise(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The allocator's averages are float32 where the factors are bfloat16, and come back uncast."""

    def run(folder: Path, *callbacks: TrainerCallback, resume: str | None = None) -> Method:
        method = put_in(kind, bert(dtype), 0.3)
        given = parts(method.model, folder, max_steps=12, save_strategy="steps", save_steps=6)
        PenaltyTrainer(method=method, callbacks=list(callbacks), **given).train(resume_from_checkpoint=resume)
        return method

    straight = run(tmp_path / "straight")
    run(tmp_path / "stopped", Stop(6))
    resumed = run(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-6"))
    for name, value in trained(straight.model).items():
        assert torch.equal(value, trained(resumed.model)[name]), name
    if kind == "adalora":
        ends = [method.state["allocator"].state_dict() for method in (straight, resumed)]
        assert ends[0].keys() == ends[1].keys() and "threshold" in ends[0]
        for key, value in ends[0].items():
            assert torch.equal(value, ends[1][key]), key
        averages = [v for k, v in ends[1].items() if k.startswith("importance")]
        assert all(v.dtype == torch.float32 and v.any() for v in averages)


@pytest.mark.parametrize(
    ("kind", "labels", "head"),
    [
        (BertForTokenClassification, {"labels": torch.tensor([0, 1, 1, 0, 1])}, "classifier"),
        (BertForQuestionAnswering, {"start_positions": 1, "end_positions": 3}, "qa_outputs"),
        (BertForSequenceClassification, {"labels": 0.5}, "classifier|bert.pooler"),
        (BertForMaskedLM, {"labels": torch.arange(5)}, None),
    ],
)
def test_any_task_head(kind: Any, labels: dict[str, Any], head: str | None, tmp_path: Path) -> None:
    """Factors and the head of the task train. A masked language model has no such head: its own is pretrained."""
    config = copy.deepcopy(bert().config)
    if isinstance(labels.get("labels"), float):
        config.num_labels = 1
    model = kind(config)
    method = adalora(model, ["query", "value"], r=4, lora_alpha=8, target_rank=2, final_warmup=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train = [{"input_ids": torch.tensor([2, 5, 6 + i, 7, 3])} | labels for i in range(16)]
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=1)
    Trainer(model=model, args=args, train_dataset=train, callbacks=[MethodCallback(method)]).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    names = {name for name in moved if "lora_" not in name}
    assert names == {name for name in before if head and re.match(head, name)}
    assert any("lora_B" in name for name in moved) and method.facts()["total_rank"] == 8


class HalfUsed(nn.Module):
    """A classifier with a linear layer that its forward never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 8), nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.used(rows))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", ["lora", "adalora", "sora", "v1", "v2"])
def test_a_layer_that_is_not_used_is_left_alone(kind: str, tmp_path: Path) -> None:
    """Without a gradient nothing is masked, and importance is 0; only the penalty moves its factors."""
    chosen: dict[str, Any] = {"r": R, "lora_alpha": ALPHA}
    for penalty in (0.0, 0.1):
        model = HalfUsed()
        if kind == "adalora":
            method = adalora(model, ["all-linear"], target_rank=2, final_warmup=2, reg_orth_coef=penalty, **chosen)
        elif kind == "sora":
            method = sora(model, ["all-linear"], threshold=1e-4, sparse_lambda=penalty, **chosen)
        elif kind == "lora":
            method = lora(model, ["all-linear"], reg_orth_coef=penalty, **chosen)
        else:
            method = rm_lora(model, ["all-linear"], random_rank=2, version=kind, reg_orth_coef=penalty, **chosen)
        for a in (p for name, p in model.named_parameters() if name.endswith("lora_B")):
            nn.init.normal_(a)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        rows = [{"rows": torch.randn(6), "labels": i % 2} for i in range(16)]
        args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=1, weight_decay=0.0)
        PenaltyTrainer(model=model, args=args, train_dataset=rows, method=method).train()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {"used.lora_A", "used.lora_B"} <= moved
        assert ("unused.lora_A" in moved) == (penalty > 0 and kind != "sora")


def test_a_quantised_layer_is_sent_to_peft() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="0 is quantised .*adapt the model with PEFT"):
        lora(model, ["all-linear"], r=2, lora_alpha=2)


def test_what_a_trainer_lacks_is_reported(tmp_path: Path) -> None:
    method = put_in("v1", bert(), 0.3)
    with pytest.raises(InputError, match="rm-lora-v1 has a penalty.*WithPenalty"):
        Trainer(callbacks=[MethodCallback(method)], **parts(method.model, tmp_path)).train()
    with pytest.raises(InputError, match="adds a MethodCallback itself"):
        PenaltyTrainer(method=method, callbacks=[MethodCallback(method)], **parts(method.model, tmp_path))
    method = put_in("sora", bert(), 0.0)
    with pytest.raises(InputError, match=r"SparseAdamW: give the trainer optimizers=\(method.optimizer\(lr\), None\)"):
        Trainer(callbacks=[MethodCallback(method)], **parts(method.model, tmp_path)).train()
    method = put_in("adalora", bert(), 0.0)
    given = parts(method.model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    Trainer(**given).train()
    given = parts(method.model, tmp_path)
    with pytest.raises(InputError, match="checkpoint of step 2 holds no state of adalora"):
        Trainer(callbacks=[MethodCallback(method)], **given).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")


# ---- PEFT's models ----


def peft_lora(model: nn.Module, **changes: Any) -> Any:
    settings: dict[str, Any] = {"task_type": "SEQ_CLS", "r": R, "lora_alpha": ALPHA, "target_modules": TARGETS}
    settings |= {"modules_to_save": HEAD, "exclude_modules": r".*attention\.output\.dense"}
    return peft.get_peft_model(model, peft.LoraConfig(**(settings | changes)))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_peft_lora_with_our_mask_and_penalty_is_our_rm_lora(version: str, tmp_path: Path) -> None:
    """Twenty steps in float64 without dropout; only the starting values are handed over."""
    own = put_in(version, bert(), 0.3)
    start = copy.deepcopy(trained(own.model))
    wanted = ours(own, tmp_path)
    model = peft_lora(bert())
    put(start, model)
    method = rm_lora(model, random_rank=2, version=version, seed=3, reg_orth_coef=0.3)
    PenaltyTrainer(method=method, **parts(model, tmp_path)).train()
    assert furthest(in_our_names(model), wanted) <= 1e-12
    assert all((wanted[name] - start[name]).abs().max() > 1e-3 for name in wanted)


def test_peft_adalora_is_driven_by_our_allocator(tmp_path: Path) -> None:
    """Nobody calls update_and_allocate. PEFT adds its own penalty to the loss that the model returns."""
    own = put_in("adalora", bert(), 0.3)
    start = copy.deepcopy(trained(own.model))
    changes = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    given = parts(own.model, tmp_path, **changes) | {"compute_loss_func": None}
    PenaltyTrainer(method=own, **given).train()
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=R,
        target_r=2,
        lora_alpha=ALPHA,
        total_step=20,
        orth_reg_weight=0.3,
        target_modules=r".*(query|value|\d\.output\.dense)",
        modules_to_save=HEAD,
    )
    model = peft.get_peft_model(bert(), config).double()
    method = adalora(model, target_rank=2, init_warmup=3, final_warmup=5, mask_interval=2)
    put(start, model)  # in float64 PEFT leaves ranknum trainable
    given = parts(model, tmp_path, **changes) | {"compute_loss_func": None}
    Trainer(callbacks=[MethodCallback(method)], **given).train()
    assert furthest(in_our_names(model), trained(own.model)) <= 1e-12
    assert method.facts()["total_rank"] == 2 * len(method.factors.names) == 12
    with pytest.raises(InputError, match="orthogonality penalty of its own"):
        adalora(model, target_rank=2, reg_orth_coef=0.1)


def test_ranks_adapters_and_whole_modules_of_peft() -> None:
    model = peft_lora(bert(), use_rslora=True, rank_pattern={"query": 3})
    found = peft_factors(model)
    assert [len(a) for a in found.A] == [3, 4, 4] * 2
    assert found.names[0] == "bert.encoder.layer.0.attention.self.query"
    batch = runs.Padder()(runs.rows(8))
    method = rm_lora(model, random_rank=1, seed=1)
    for b in found.B:
        nn.init.normal_(b)  # where B is 0, A has no gradient
    model(**batch).loss.backward()
    method.before_step(0)
    for a, b in zip(found.A, found.B, strict=True):
        assert int(a.grad.any(1).sum()) == int(b.grad.any(0).sum()) == 1
    head = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
    assert head.grad.all(), "what PEFT trains as a whole is left alone"
    model.add_adapter("second", peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["key"]))
    model.set_adapter("second")
    assert [name.rpartition(".")[2] for name in peft_factors(model).names] == ["key"] * 2
    model = refused()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["key"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match="default, second are active"):
        peft_factors(model)


def refused(**changes: Any) -> Any:
    return peft_lora(
        bert(), task_type=None, modules_to_save=None, exclude_modules=None, **({"target_modules": ["query"]} | changes)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rm_lora(refused(use_dora=True), random_rank=1), r"DoRA's magnitudes \(use_dora\)"),
        (lambda: rm_lora(refused(target_modules=["word_embeddings"]), random_rank=1), "adapts the embedding"),
        (lambda: rm_lora(refused(inference_mode=True), random_rank=1), "does not train"),
        (
            lambda: rm_lora(peft.get_peft_model(bert(), peft.VeraConfig(target_modules=["query"])), random_rank=1),
            "VERA",
        ),
        (lambda: adalora(refused(), target_rank=1), "AdaLoRA needs triplets"),
        (lambda: sora(refused(), threshold=0.1), "PEFT's layers have none"),
        (lambda: lora(refused(), ["query"], r=2, lora_alpha=2), "PEFT has adapted the model already"),
    ],
)
def test_settings_that_peft_models_cannot_have_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_merged_adapter_of_peft_is_refused() -> None:
    model = refused()
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        rm_lora(model, random_rank=1)
