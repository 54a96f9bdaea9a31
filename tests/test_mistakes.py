"""What users of the library get wrong, and modules that do not call their layers: nothing of it stays silent."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_runs import make_base, make_run
from test_library import ALPHA, MODULES, PenaltyTrainer, R, bert, parts, put_in
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertForTokenClassification, Trainer, TrainerCallback

import loralib
from loralib.errors import InputError
from loralib.methods import Method

SIZES: dict[str, Any] = {"r": R, "lora_alpha": ALPHA}


# ---- torch's own transformer ----


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 2))


def test_torchs_encoder_layer_uses_its_adapters_in_evaluation() -> None:
    """Its fast path for evaluation takes the weights of its layers and does not call them."""
    model, rows = encoder(), torch.randn(2, 5, 16)
    method = loralib.lora(model, ["all-linear"], **SIZES)
    assert method.factors is not None
    for b in method.factors.B:
        nn.init.normal_(b)
    wanted = model.train()(rows).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(rows), wanted)
        loralib.merge(model)
        torch.testing.assert_close(model(rows), wanted)


def test_a_layer_that_is_never_called_is_not_adapted() -> None:
    """nn.MultiheadAttention takes the weight of its out_proj: a factor there has no effect and no gradient."""
    method = loralib.lora(model := encoder(), "all-linear", **SIZES)
    assert method.factors is not None
    model(torch.randn(2, 5, 16)).sum().backward()
    assert len(method.factors.names) == 5 and all(b.grad is not None for b in method.factors.B)
    with pytest.raises(InputError, match="'out_proj' matches no linear layer"):
        loralib.lora(encoder(), ["out_proj"], **SIZES)


# ---- predict ----


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", make_base(tmp_path / "base", "bert"))
    return tmp_path / "run"


@pytest.mark.parametrize("texts", [["a b", ("a b", "c d")], [("a b", "c d"), "a b"]])
def test_texts_and_pairs_in_one_list_are_refused(texts: Any, run: Path) -> None:
    """The second text of a pair was left out if the batch began with a single text."""
    with pytest.raises(InputError, match="text 1 is .*: give texts alone or pairs alone"):
        loralib.predict(run, texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, it must be 1 or more"),
        ({"batch_size": -1}, "batch_size is -1, it must be 1 or more"),
        ({"max_length": 0}, "max_length is 0, it must lie in 3 to 40"),
        ({"max_length": 41}, "max_length is 41, it must lie in 3 to 40"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings: dict[str, int], message: str, run: Path) -> None:
    with pytest.raises(InputError, match=message):
        loralib.predict(run, ["a b"], **settings)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_a_long_text_is_cut_to_the_models_positions(family: str, tmp_path: Path) -> None:
    """RoBERTa's table has a row for each token and one more for each index up to that of padding."""
    make_run(tmp_path / "run", make_base(tmp_path / "base", family))
    model, tokenizer = loralib.load(tmp_path / "run")
    tokenizer.model_max_length = int(1e30)  # as in folders that do not state it
    (long,) = loralib.predict(model, ["a b " * 100], tokenizer)
    positions = 39 if family == "roberta" else 40
    assert long == loralib.predict(model, ["a b " * 100], tokenizer, max_length=positions)[0]


def test_a_token_classifier_gives_no_label_of_a_text(run: Path) -> None:
    model, tokenizer = loralib.load(run)
    with pytest.raises(InputError, match="BertForTokenClassification gives no label for a text"):
        loralib.predict(BertForTokenClassification(model.config), ["a b"], tokenizer)


# ---- loops that leave out a call ----


def steps(method: Method, *left_out: str, count: int = 3) -> None:
    """The loop of the library page, without some of its calls."""
    optimizer: Any = method.optimizer(lr=0.01)
    model: Any = method.model
    method.begin(count)
    for step in range(count):
        loss = model(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([0])).loss
        (loss + (0.0 if "loss" in left_out else method.loss())).backward()
        if "before_step" not in left_out:
            method.before_step(step)
        optimizer.step()
        if "after_step" not in left_out:
            method.after_step(step)
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "left_out"), [("v1", "before_step"), ("adalora", "after_step"), ("sora", "loss"), ("lora", "loss")]
)
def test_a_call_that_a_loop_leaves_out_is_noticed(kind: str, left_out: str) -> None:
    model = bert(torch.float32)
    with pytest.raises(InputError, match=rf"needs method\.{left_out}\("):
        if kind == "adalora":
            method = loralib.adalora(model, MODULES, target_rank=2, reg_orth_coef=0.3, **SIZES)
        else:
            method = put_in(kind, model, 0.3)
        steps(method, left_out)


@pytest.mark.parametrize("kind", ["lora", "sora", "v1"])
def test_a_call_that_does_nothing_may_be_left_out(kind: str) -> None:
    idle = ["loss", "after_step"] if kind == "v1" else ["loss", "before_step", "after_step"]
    steps(put_in(kind, bert(torch.float32), 0.0), *idle)


# ---- trainers ----


def test_an_optimizer_without_the_factors_is_refused(tmp_path: Path) -> None:
    """It was made before the model was adapted, or the trainer has another model: no factor would train."""
    model = bert(torch.float32)
    early = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = put_in("v1", model, 0.0)
    with pytest.raises(InputError, match="holds none of the factors of rm-lora-v1"):
        given = parts(model, tmp_path)
        Trainer(callbacks=[loralib.MethodCallback(method)], optimizers=(early, None), **given).train()
    other = bert(torch.float32)
    put_in("v1", other, 0.0)
    with pytest.raises(InputError, match="holds none of the factors of rm-lora-v1"):
        Trainer(callbacks=[loralib.MethodCallback(method)], **parts(other, tmp_path)).train()


class OwnStep(PenaltyTrainer):
    """It computes the step itself and does not call super(), so nobody adds the penalty."""

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_penalty_that_nobody_adds_is_noticed(tmp_path: Path) -> None:
    method = put_in("lora", bert(torch.float32), 0.3)
    with pytest.raises(InputError, match=r"the penalty of lora was not computed.*super\(\).training_step"):
        OwnStep(method=method, **parts(method.model, tmp_path)).train()
    callback = loralib.MethodCallback(method, penalty_in_loss=True)  # which this loss does not have
    with pytest.raises(InputError, match="the penalty of lora was not computed"):
        Trainer(callbacks=[callback], **parts(method.model, tmp_path)).train()


class FirstImportance(TrainerCallback):
    def __init__(self, method: Method) -> None:
        self.allocator: Any = method.state["allocator"]
        self.at_start: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.at_start.append(sum(float(i.sum()) for i in self.allocator.importance))


def test_a_second_training_begins_without_importance(tmp_path: Path) -> None:
    method = put_in("adalora", bert(torch.float32), 0.0)
    seen = FirstImportance(method)
    trainer = Trainer(callbacks=[loralib.MethodCallback(method), seen], **parts(method.model, tmp_path, max_steps=9))
    trainer.train()
    assert sum(float(i.sum()) for i in seen.allocator.importance) > 0
    trainer.train()
    assert seen.at_start == [0.0, 0.0]


# ---- files ----


def classifier(base: Path, **names: Any) -> Any:
    return BertForSequenceClassification.from_pretrained(base, num_labels=3, **names)


def test_labels_and_what_trained_come_back(tmp_path: Path) -> None:
    """Labels of the model's config, and parameters that the user let train beside factors and head."""
    base = make_base(tmp_path / "base", "bert")
    model = classifier(base, id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})
    loralib.lora(model, ["query"], **SIZES)
    for name, p in model.named_parameters():
        if "LayerNorm" in name:
            nn.init.normal_(p.requires_grad_())
    loralib.save_adapter(model, tmp_path / "first")
    again, tokenizer = loralib.load(tmp_path / "first")
    wanted = loralib.predict(model, ["a b"], tokenizer)
    assert set(wanted[0].scores) == {"bad", "fair", "good"}
    training = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert training[0] == training[1]
    loralib.save_adapter(again, tmp_path / "second")
    assert loralib.predict(tmp_path / "second", ["a b"]) == loralib.predict(tmp_path / "first", ["a b"]) == wanted


def test_models_without_layers_of_this_project_are_not_saved_or_merged(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    with pytest.raises(InputError, match="has no adapted layer: save it by its own save_pretrained"):
        loralib.save_adapter(classifier(base), tmp_path / "out")
    adapted = peft.get_peft_model(classifier(base), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(InputError, match="PEFT has adapted the model: save it by its own save_pretrained"):
        loralib.save_adapter(adapted, tmp_path / "out")
    with pytest.raises(InputError, match="PEFT has adapted the model: merge it by its own merge_and_unload"):
        loralib.merge(adapted)
    assert not (tmp_path / "out").exists()


# ---- values outside their range ----


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lora", {"r": 0}, "lora_r is 0, it must be a whole number of 1 or more"),
        ("lora", {"r": 2.5}, "lora_r is 2.5, it must be a whole number"),
        ("lora", {"lora_dropout": -0.1}, "lora_dropout is -0.1, it must be at least 0 and below 1"),
        ("lora", {"reg_orth_coef": -1}, "reg_orth_coef is -1, it must be 0 or more"),
        ("adalora", {"mask_interval": 0}, "mask_interval is 0, it must be 1 or more"),
        ("adalora", {"beta1": 1.5}, "beta1 is 1.5, it must lie between 0 and 1, both excluded"),
        ("adalora", {"final_warmup": -3}, "final_warmup is -3, it must be 0 or more"),
        ("adalora", {"target_rank": 1.5}, "target_rank is 1.5, it must be a whole number"),
        ("sora", {"threshold": -1}, "threshold is -1, it must be 0 or more"),
        ("sora", {"sparse_lambda": -1}, "sparse_lambda is -1, it must be 0 or more"),
        ("rm_lora", {"random_rank": 1.5}, "random_rank is 1.5, it must be a whole number"),
    ],
)
def test_values_outside_their_range_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    """From Python no flag checks them: with a negative threshold gates grew, and no negative warm-up was noticed."""
    needed = {"adalora": {"target_rank": 2}, "sora": {"threshold": 0.01}, "rm_lora": {"random_rank": 2}}.get(kind, {})
    with pytest.raises(InputError, match=message):
        getattr(loralib, kind)(bert(), MODULES, **(SIZES | needed | settings))


@pytest.mark.parametrize(("final_warmup", "warned"), [(0, True), (1, True), (2, False)])
def test_a_schedule_that_ends_above_its_target_is_said(final_warmup: int, warned: bool, caplog: Any) -> None:
    """Masked values grow again at the next step, so the last step must mask: 7 is no multiple of the interval 10."""
    method = loralib.adalora(bert(torch.float32), MODULES, target_rank=2, final_warmup=final_warmup, **SIZES)
    assert method.factors is not None
    with caplog.at_level("WARNING", logger="loralib"):
        steps(method, count=8)
    kept, all_of_them = 2 * len(method.factors.names), R * len(method.factors.names)
    assert method.facts()["total_rank"] == (all_of_them if warned else kept)
    assert (f"up to {all_of_them} singular values and not {kept}" in caplog.text) == warned
