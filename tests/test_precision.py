"""bf16 and the rules of fp16: what is computed in float32, and that a step the scaler skips changes nothing."""

import logging
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn

from loralib.adapt import adapt, factors
from loralib.allocator import RankAllocator
from loralib.layers import GatedLinear, SVDLinear
from loralib.methods import adalora
from loralib.regularizer import frd_penalty, svd_penalty
from loralib.sparse import SparseAdamW, gate_l1
from loralib.training.method_callback import MethodCallback

TRAIN = runs.rows(24)
STEPS = {"max_steps": 12, "logging_steps": 1, "save_strategy": "no"}


@pytest.mark.parametrize("method", runs.METHODS)
def test_bf16_trains_every_method(method: str, tmp_path: Path) -> None:
    """Losses stay finite and near those of float32; products run in bfloat16, parameters and penalty in float32."""
    full = runs.trainer(method, runs.arguments(tmp_path, **STEPS), TRAIN, dropout=0.0)
    full.train()
    run = runs.trainer(method, runs.arguments(tmp_path, bf16=True, **STEPS), TRAIN, dropout=0.0)
    penalties: list[torch.dtype] = []
    if run.penalty is not None:
        stock = run.penalty
        run.penalty = lambda: penalties.append((value := stock()).dtype) or value
    products: list[torch.dtype] = []
    query = run.model.deberta.encoder.layer[0].attention.self.query_proj
    query.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    run.train()
    assert set(products) == {torch.bfloat16}
    assert set(penalties) <= {torch.float32} and (len(penalties) == 12 or method in ("lora", "full"))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    reference = [log["loss"] for log in full.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(reference[0], rel=0.02) and losses != reference
    assert all(0 < loss < 3 for loss in losses)
    if "allocator" in run.method_state:
        allocator = run.method_state["allocator"]
        assert {t.dtype for t in allocator.importance + allocator.uncertainty} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_penalties_and_importance_of_half_precision_factors_are_float32(dtype: torch.dtype) -> None:
    a, b = [torch.randn(4, 9).to(dtype)], [torch.randn(7, 4).to(dtype)]
    for penalty in (svd_penalty, frd_penalty):
        value = penalty(a, b)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(penalty([a[0].double()], [b[0].double()]).item(), rel=1e-5)
    assert gate_l1([a[0]]).dtype == torch.float32
    model = small(SVDLinear).to(dtype)
    allocator = RankAllocator(model, target_rank=2, init_warmup=0, final_warmup=1, mask_interval=1, total_step=5)
    product = torch.zeros(())
    for p in allocator.parameters:
        p.grad = torch.full_like(p, 3e-5)  # squares of such numbers vanish in float16
        product = product.maximum((p.detach().double().abs() * p.grad.double()).max())
    allocator.step(1)
    assert allocator.importance[0].dtype == torch.float32
    assert max(i.max() for i in allocator.importance) == pytest.approx(0.15 * product.item(), rel=0.02)


def small(layer: type) -> nn.Module:
    """A backbone of one linear layer, adapted, and a head."""
    torch.manual_seed(0)
    model = nn.Module()
    model.base_model_prefix = "body"
    model.body = nn.Sequential(nn.Linear(9, 7))
    model.head = nn.Linear(7, 2)
    adapt(model, layer, ["0"], r=4, lora_alpha=8)
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def backward(model: nn.Module, scaler: Any, optimizer: torch.optim.Optimizer, poisoned: bool) -> None:
    torch.manual_seed(1)
    loss = model.head(model.body(torch.randn(5, 9))).square().mean()
    optimizer.zero_grad()
    scaler.scale(loss * (float("inf") if poisoned else 1.0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_a_skipped_step_leaves_gates_weights_and_moments() -> None:
    """A GradScaler driven by hand on the CPU: it meets an infinite gradient and does not call the optimizer, in whose
    step SoRA's threshold lies."""
    model = small(GatedLinear)
    gates = factors(model).between
    own = {id(g) for g in gates}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    optimizer = SparseAdamW([{"params": rest}, {"params": gates, "threshold": 0.05}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    backward(model, scaler, optimizer, poisoned=False)
    before, moments = snapshot(model), [s["exp_avg"].clone() for s in optimizer.state.values()]
    backward(model, scaler, optimizer, poisoned=True)
    assert scaler.get_scale() == 32.0
    assert same(before, snapshot(model))
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, optimizer.state.values(), strict=True))
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    backward(model, scaler, optimizer, poisoned=False)
    assert not same(before, snapshot(model))


def test_a_skipped_step_leaves_importance_but_not_a_mask_that_is_due() -> None:
    """The callback as the Trainer calls it, which it does after a skipped step too (ledger A7)."""
    model = small(SVDLinear)
    method = adalora(model, target_rank=2, init_warmup=1, final_warmup=1, mask_interval=2)
    method.begin(8)
    allocator = method.state["allocator"]

    class Wrapper:  # accelerate's
        step_was_skipped = False
        state: dict[str, Any] = {}

    class State:
        global_step = 0

    wrapper, state = Wrapper(), State()
    callback = MethodCallback(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(poisoned: bool) -> None:
        backward(model, scaler, optimizer, poisoned)
        wrapper.step_was_skipped = poisoned
        callback.on_optimizer_step(None, state, None, optimizer=wrapper)
        state.global_step += 1

    for _ in range(3):
        step(poisoned=False)
    before, importance = snapshot(model), [i.clone() for i in allocator.importance]
    assert any(i.any() for i in importance)
    step(poisoned=True)  # step 3: no mask is due
    assert same(before, snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(importance, allocator.importance, strict=True))
    step(poisoned=True)  # step 4: one is
    after = snapshot(model)
    changed = [k for k in after if not torch.equal(after[k], before[k])]
    assert changed == ["body.0.lora_E"]
    assert all(torch.equal(a, b) for a, b in zip(importance, allocator.importance, strict=True))
    step(poisoned=False)
    assert all(torch.isfinite(i).all() for i in allocator.importance)


def test_the_scaled_penalty_counts_as_without_a_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaler that accelerate would make for fp16 on a GPU, put in by hand: the penalty's gradient is scaled alike."""
    parts = {"max_steps": 6, "save_strategy": "no", "logging_steps": 1}
    plain = runs.trainer("svd-lora", runs.arguments(tmp_path, **parts), TRAIN, dropout=0.0, dtype=torch.float64)
    plain.train()
    scaled = runs.trainer("svd-lora", runs.arguments(tmp_path, **parts), TRAIN, dropout=0.0, dtype=torch.float64)
    accelerator = scaled.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clip = accelerator.clip_grad_norm_

    def unscale_and_clip(*args: Any) -> Any:  # accelerate does so where mixed_precision is fp16
        accelerator.scaler.unscale_(scaled.optimizer.optimizer)
        return clip(*args)

    monkeypatch.setattr(accelerator, "clip_grad_norm_", unscale_and_clip)
    scaled.train()
    for (name, a), b in zip(plain.model.named_parameters(), scaled.model.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-9, name


def test_fp16_on_the_cpu_is_reported_as_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loralib"):
        run = runs.trainer("lora", runs.arguments(tmp_path, fp16=True, **STEPS), TRAIN)
    assert "--fp16 has no effect on the CPU" in caplog.text
    run.train()
    plain = runs.trainer("lora", runs.arguments(tmp_path, **STEPS), TRAIN)
    plain.train()
    assert runs.differences(runs.result(run), runs.result(plain)) == []


@pytest.mark.parametrize("method", ["rm-lora-v2", "adalora"])
def test_gradient_checkpointing_changes_nothing(method: str, tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        args = runs.arguments(tmp_path, gradient_checkpointing=on, **STEPS)
        run = runs.trainer(method, args, TRAIN)
        run.train()
        results.append(runs.result(run))
    for log in results[0]["history"] + results[1]["history"]:
        log.pop("total_flos", None)
    assert runs.differences(*results) == []
