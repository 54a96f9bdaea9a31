"""A method as one value: what it does at its places in a training step, in a plain loop and in the stock Trainer."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from matrices import Model
from torch import Tensor, nn

from loralib.adapt import Factors, factors
from loralib.errors import InputError
from loralib.layers import GatedLinear, LoRALinear, SVDLinear
from loralib.methods import Method, adalora, full_fine_tuning, lora, rm_lora, sora
from loralib.training.method_callback import MethodCallback
from loralib.training.trainer import task_loss

ROWS = runs.rows(24, fixed_length=9)
PLAN: dict[str, Any] = {"max_steps": 20, "save_strategy": "no", "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.mark.parametrize("name", [m for m in runs.METHODS if m != "full"])
def test_a_plain_loop_trains_what_the_trainer_trains(name: str, tmp_path: Path) -> None:
    """20 steps in float64 without dropout: the same parameters, to the rounding of sums."""
    args = runs.arguments(tmp_path, train_sampling_strategy="sequential", weight_decay=0.0, **PLAN)
    settings: dict[str, Any] = {"dropout": 0.0, "dtype": torch.float64}
    trainer = runs.trainer(name, args, ROWS, **settings)
    looped = runs.trainer(name, args, ROWS, **settings)
    trainer.train()

    model, method = looped.model.train(), looped.method
    assert method is not None
    optimizer = method.optimizer(args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
    method.begin(20)
    for step in range(20):
        batch = runs.Padder()([ROWS[(4 * step + i) % 24] for i in range(4)])
        labels = batch.pop("labels")
        loss = task_loss(model(**batch).logits, labels) + method.loss()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        method.before_step(step, epoch=step // 6)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    for (key, mine), its in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        assert (mine - its).abs().max() < 1e-9, key
    assert method.facts() == trainer.method.facts()


def test_rm_lora_as_released() -> None:
    """Ledger R1, R2 and R3: which steps are masked and what becomes of the head, by flag."""
    model = Model(LoRALinear)
    model.head = nn.Linear(3, 2, dtype=torch.float64)
    for layer in model.layers:
        layer.weight.requires_grad = layer.bias.requires_grad = False

    def masked(as_released: bool, step: int) -> tuple[int, bool]:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        rm_lora(model, random_rank=1, as_released=as_released).before_step(step)
        return int(model.layers[0].lora_A.grad.any(1).sum()), bool(model.head.weight.grad.any())

    assert masked(False, 0) == (1, True) == masked(False, 1)
    assert masked(True, 0) == (4, True)
    assert masked(True, 1) == (1, False)


def test_rm_lora_measures_the_gradient_where_a_step_is_logged() -> None:
    model = Model(LoRALinear)
    method = rm_lora(model, random_rank=1)
    of = factors(model)
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        method.before_step(step, measure=step == 1)
        found = method.scalars()
        assert (found == {}) == (step == 0)
    elements = sum(p.numel() for p in (*of.A, *of.B))
    assert found["train/grad_norm_before_mask"] == pytest.approx(elements**0.5)
    assert found["train/grad_norm_after_mask"] == pytest.approx((elements / 4) ** 0.5)  # one direction of four
    assert method.scalars() == {}
    assert method.facts() == {"random_rank": 1, "directions_per_step": 4}


def test_an_epoch_draws_once() -> None:
    """Ledger R3."""
    model = Model(LoRALinear)
    method = rm_lora(model, random_rank=1, mask_resample="epoch")
    seen = []
    for step in range(6):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        method.before_step(step, epoch=step // 3)
        seen.append(torch.cat([layer.lora_A.grad.any(1) for layer in model.layers]))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[3], seen[5]) and not torch.equal(seen[0], seen[3])


def test_what_each_method_says_of_itself() -> None:
    model = Model(SVDLinear)
    method = adalora(model, target_rank=2, init_warmup=1, final_warmup=2, log_every=7)
    assert method.plan(10) == "budget: 16 singular values until step 1, then falling to 8 at step 8 of 10"
    assert method.scalars()["Budget/total_rank"] == 16 and method.log_every == 7
    assert method.scalars()["Budget/sum_param"] == sum(4 * (n + m + 1) for n, m in [(6, 5), (6, 5), (5, 9), (9, 6)])
    assert method.complaint() is None and list(method.state) == ["allocator"]
    with pytest.raises(InputError, match="must stay below the total of 3"):
        method.begin(3)

    gated = Model(GatedLinear)
    method = sora(gated, threshold=0.25, sparse_lambda=0.5, sparse_lr=0.1)
    (group,) = method.own_groups
    assert group["threshold"] == 0.25 and group["lr"] == 0.1 and len(group["params"]) == 4
    gated.layers[0].lora_gate.data[0, 1:] = 0
    left = 1 * 11 + 4 * (11 + 14 + 15)
    assert method.scalars() == {"Gates/nonzero_share": 13 / 16, "Gates/remaining_parameters": left}
    assert method.facts()["remaining"] == left and method.complaint() is None
    for layer in gated.layers:
        layer.lora_gate.data.zero_()
    assert "every gate is 0" in str(method.complaint()) and "0.25" in str(method.complaint())
    assert not method.loss().any()

    full = full_fine_tuning(nn.Linear(2, 2))
    assert full.factors is None and full.loss() == 0.0 and full.facts() == full.scalars() == {} and full.plan(9) == ""
    assert isinstance(full.optimizer(0.1), torch.optim.AdamW)


def test_a_method_adapts_a_model_or_takes_what_is_adapted() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    method = rm_lora(model, ["all-linear"], random_rank=1, r=3, lora_alpha=6)
    assert method.factors.names == ["0", "1"] and isinstance(model[0], LoRALinear) and model[0].r == 3
    again = rm_lora(model, random_rank=2)
    assert again.factors.A[0] is method.factors.A[0] is model[0].lora_A
    alone = rm_lora(factors(model), random_rank=2)
    assert alone.model is None and alone.factors == again.factors
    with pytest.raises(InputError, match="make the optimizer yourself"):
        alone.optimizer(0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_in_half_precision_are_warned_of(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """A float16 near 1 has no neighbour within 0.0005, so that steps of AdamW with 1e-4 leave it where it is."""
    lora(Model(LoRALinear).to(dtype))
    assert [str(dtype) in line for line in caplog.messages] == [True] * (dtype != torch.float32)


def test_settings_that_contradict_the_model_are_refused() -> None:
    model = Model(LoRALinear)
    refused: list[tuple[Any, str]] = [
        (lambda: lora(nn.Linear(3, 3)), "Linear has no adapted layer"),
        (lambda: lora(model, r=3), "r are settings of new layers"),
        (lambda: lora(model, ["all-linear"], r=3, lora_alpha=3), "adapted already"),
        (lambda: lora(factors(model), ["all-linear"], r=3), "factors are adapted already"),
        (lambda: adalora(model, target_rank=1), "AdaLoRA needs triplets"),
        (lambda: sora(model, threshold=0.1), "SoRA needs gates"),
        (lambda: sora(Model(SVDLinear), threshold=0.1), "SoRA needs gates"),
        (lambda: rm_lora(model, random_rank=9), "random_rank must be between 1 and 4 .*it is 9"),
        (lambda: rm_lora(model, random_rank=1, mask_resample="day"), "step or epoch"),
    ]
    for call, said in refused:
        with pytest.raises(InputError, match=said):
            call()
    mixed = nn.ModuleList([*Model(LoRALinear).layers, *Model(GatedLinear).layers])
    with pytest.raises(InputError, match="4 of 8 adapted layers have something between"):
        lora(mixed)


def test_the_callback_calls_a_method_at_its_places(caplog: pytest.LogCaptureFixture) -> None:
    """What the stock hooks hand over is all that it needs; a step that a scaler skipped is told."""
    calls: list[Any] = []
    method = Method(
        "own",
        begin=lambda total: calls.append(("begin", total)),
        before_step=lambda step, **more: calls.append(("before", step, more)),
        after_step=lambda step, **more: calls.append(("after", step, more)),
        scalars=lambda: {"Own/number": 1.0},
        complaint=lambda: "it came to nothing",
        facts=lambda: {"fact": 2},
    )
    written: list[Any] = []
    callback = MethodCallback(method, written.append)
    args = SimpleNamespace(logging_strategy="steps")
    state = SimpleNamespace(global_step=3, epoch=1.5, max_steps=8, logging_steps=4, is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    callback.on_pre_optimizer_step(args, state, None)
    callback.on_optimizer_step(args, state, None, optimizer=SimpleNamespace(step_was_skipped=True))
    callback.on_optimizer_step(args, state, None, optimizer=torch.optim.SGD([torch.zeros(1)]))
    assert calls == [
        ("begin", 8),
        ("before", 3, {"epoch": 1, "measure": True}),
        ("after", 3, {"gradients_valid": False}),
        ("after", 3, {"gradients_valid": True}),
    ]
    with caplog.at_level(logging.WARNING, logger="loralib"):
        callback.on_log(args, state, None, logs={"eval_loss": 1.0})
        assert not written and not caplog.text
        callback.on_log(args, state, None, logs={"loss": 1.0})
    assert written == [{"Own/number": 1.0}] and "step 3: it came to nothing" in caplog.text
    method.log_every = 3
    callback.on_step_end(args, state, None)
    callback.on_log(args, state, None, logs={"loss": 1.0})
    assert len(written) == 2 and callback.summary() == {"fact": 2}


def test_penalties_take_factors_of_any_origin() -> None:
    A, B = [torch.randn(3, 6, requires_grad=True)], [torch.randn(5, 3, requires_grad=True)]
    method = rm_lora(Factors(["w"], list[Tensor](A), list[Tensor](B)), random_rank=3, reg_orth_coef=0.5)
    residuals = [A[0] @ A[0].T - torch.eye(3), B[0].T @ B[0] - torch.eye(3)]
    torch.testing.assert_close(method.loss(), 0.5 * sum(r.norm() for r in residuals) / 2)


def test_an_epochs_mask_needs_the_epoch_and_the_released_mask_the_model() -> None:
    """Without them one draw would serve the whole training, or the head would train although it is asked not to."""
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    method = rm_lora(network, ["0"], r=4, lora_alpha=8, random_rank=1, mask_resample="epoch")
    network(torch.ones(1, 6)).sum().backward()
    with pytest.raises(InputError, match="before_step got no epoch"):
        method.before_step(3)
    method.before_step(3, epoch=0)
    assert method.factors is not None
    with pytest.raises(InputError, match="give the model, not its factors"):
        rm_lora(method.factors, random_rank=1, as_released=True)
