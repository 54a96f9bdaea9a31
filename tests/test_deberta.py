"""The fast attention and the packed execution against the stock DeBERTa code, which is their oracle."""

import copy
import logging
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2ForSequenceClassification
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from loralib.adapt import ROLES, adapt
from loralib.errors import InputError
from loralib.kernels.banded import BandedAttention, band
from loralib.kernels.deberta import FastSelfAttention, unpad, use_fast_attention
from loralib.layers import GatedLinear, LoRALinear, SVDLinear

VARIANTS = {
    "v3": {},
    "c2p": {"pos_att_type": "c2p"},
    "p2c": {"pos_att_type": "p2c"},
    "own projections": {"share_att_key": False},
    "own projections, c2p": {"share_att_key": False, "pos_att_type": "c2p"},
    "own projections, p2c": {"share_att_key": False, "pos_att_type": "p2c"},
    "no buckets": {"position_buckets": -1},
    "buckets with holes": {"position_buckets": 16, "max_relative_positions": 12},
    "convolution": {"conv_kernel_size": 3},
    "table not normalised": {"norm_rel_ebd": "none"},
}


def build(seed: int = 0, dropout: float = 0.0, **changes: object) -> DebertaV2ForSequenceClassification:
    """Two layers with large random weights, so that attention is far from uniform; in training mode."""
    settings_ = {
        "vocab_size": 60,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "max_relative_positions": -1,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return DebertaV2ForSequenceClassification(DebertaV2Config(**(settings_ | changes))).train()


def batch(length: int, rows: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """ids and mask (rows, length); the second row is half padding, the third is padded by one."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (rows, length), generator=g)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, (length + 1) // 2 :] = 0
    if rows > 2 and length > 1:
        mask[2, -1] = 0
    return ids, mask


def run(model: nn.Module, ids: Tensor, mask: Tensor, only_real: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states (rows, length, hidden) and the gradients of all parameters for a random linear loss on them."""
    model.zero_grad()
    hidden = model.deberta(input_ids=ids, attention_mask=mask)[0]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(hidden)
    if only_real:
        weights = weights * mask.unsqueeze(-1)
        hidden = hidden * mask.unsqueeze(-1)
    (hidden * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Largest difference of outputs and gradients, relative where numbers are above 1."""
    assert a[1].keys() == b[1].keys()
    pairs = [(a[0], b[0]), *((a[1][n], b[1][n]) for n in a[1])]
    return max(float((x - y).abs().max() / (1 + x.abs().max())) for x, y in pairs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 33, 70])
def test_float64_outputs_and_gradients_are_the_stock_ones(variant: str, length: int) -> None:
    """Padded rows, the relative table and every projection included; buckets repeat from length 10 on."""
    stock = build(**VARIANTS[variant]).double()
    fast = copy.deepcopy(stock)
    assert use_fast_attention(fast)
    ids, mask = batch(length)
    assert difference(run(stock, ids, mask), run(fast, ids, mask)) < 1e-10


@settings(max_examples=12, deadline=None, derandomize=True)
@given(length=st.integers(1, 512), seed=st.integers(0, 1000))
def test_real_buckets_at_any_length(length: int, seed: int) -> None:
    """DeBERTa-v3's own 256 buckets over 512 positions, lengths 1 to 512."""
    sizes = {"position_buckets": 256, "max_position_embeddings": 512, "num_hidden_layers": 1, "hidden_size": 8}
    stock = build(seed, **sizes, num_attention_heads=2, intermediate_size=8).double()
    fast = copy.deepcopy(stock)
    use_fast_attention(fast)
    ids, mask = batch(length, rows=2, seed=seed)
    assert difference(run(stock, ids, mask), run(fast, ids, mask)) < 1e-10
    unpad(fast)
    assert difference(run(stock, ids, mask, only_real=True), run(fast, ids, mask, only_real=True)) < 1e-10


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_float32(length: int, packed: bool) -> None:
    stock = build(initializer_range=0.1)
    fast = copy.deepcopy(stock)
    (unpad if packed else use_fast_attention)(fast)
    ids, mask = batch(length)
    assert difference(run(stock, ids, mask, only_real=True), run(fast, ids, mask, only_real=True)) < 1e-5


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "convolution"])
@pytest.mark.parametrize("length", [1, 9, 40])
def test_packed_rows_are_the_padded_ones(variant: str, length: int) -> None:
    stock = build(**VARIANTS[variant]).double()
    packed = copy.deepcopy(stock)
    assert unpad(packed)
    ids, mask = batch(length)
    assert difference(run(stock, ids, mask, only_real=True), run(packed, ids, mask, only_real=True)) < 1e-10
    hidden = packed.deberta(input_ids=ids, attention_mask=mask)[0]
    assert hidden.shape == (3, length, 24)
    assert not hidden[mask == 0].any()


def classify(model: nn.Module, ids: Tensor, mask: Tensor, **more: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of the cross-entropy for all parameters that got one."""
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask, **more).logits
    nn.functional.cross_entropy(logits, torch.arange(len(ids)) % 2).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 9, 40])
def test_only_the_first_token_is_computed_for_the_logits(variant: str, packed: bool, length: int) -> None:
    """Whole classifier: the last layer runs for the first token only, gradients included."""
    stock = build(**VARIANTS[variant]).double()
    fast = copy.deepcopy(stock)
    (unpad if packed else use_fast_attention)(fast)
    ids, mask = batch(length)
    shapes = []
    fast.deberta.encoder.layer[-1].output.register_forward_hook(lambda _, args, out: shapes.append(out.numel()))
    assert difference(classify(stock, ids, mask), classify(fast, ids, mask)) < 1e-10
    assert shapes == [3 * 24]
    whole = fast.deberta(input_ids=ids, attention_mask=mask)[0]  # without the head, all tokens are wanted
    assert whole.shape == (3, length, 24)


def test_only_the_first_token_with_a_convolution_in_the_only_layer() -> None:
    stock = build(conv_kernel_size=3, num_hidden_layers=1).double()
    fast = copy.deepcopy(stock)
    use_fast_attention(fast)
    assert difference(classify(stock, *batch(9)), classify(fast, *batch(9))) < 1e-10


def test_packing_takes_padding_anywhere() -> None:
    """Left padding and holes: what is real is decided by the mask, not by a length."""
    stock = build().double()
    packed = copy.deepcopy(stock)
    unpad(packed)
    ids, mask = batch(12)
    mask[0, :5] = 0
    mask[2, 3:6] = 0
    assert difference(run(stock, ids, mask, only_real=True), run(packed, ids, mask, only_real=True)) < 1e-10


def test_packing_refuses_a_head_that_would_read_padding() -> None:
    """The row of another text would be read in its place; models that read all tokens keep their rows."""
    packed = build().double()
    unpad(packed)
    ids, mask = batch(12)
    for row in (0, 2):
        left = mask.clone()
        left[row, :5] = 0
        with pytest.raises(InputError, match="a row of the batch begins with padding.*padding_side = 'right'"):
            packed(input_ids=ids, attention_mask=left)
    packed(input_ids=ids, attention_mask=mask)


def test_packed_layers_see_real_tokens_only() -> None:
    model = build()
    unpad(model)
    ids, mask = batch(12)
    seen = []
    for layer in model.deberta.encoder.layer:
        layer.intermediate.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        layer.attention.self.value_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(input_ids=ids, attention_mask=mask)
    assert seen == [(int(mask.sum()), 24)] * 3 + [(3, 24)]


def test_a_mask_of_pairs() -> None:
    """A (batch, length, length) mask, as for packed sentences: the packing leaves such a batch padded."""
    stock = build().double()
    fast = copy.deepcopy(stock)
    unpad(fast)
    ids, _ = batch(7)
    mask = torch.ones(3, 7, 7, dtype=torch.long).tril()
    states = torch.randn(3, 7, 24, dtype=torch.float64)
    expected = stock.deberta.encoder(states, mask)
    actual = fast.deberta.encoder(states, mask)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_and_attentions_when_asked(packed: bool) -> None:
    stock = build().double().eval()
    fast = copy.deepcopy(stock)
    (unpad if packed else use_fast_attention)(fast)
    ids, mask = batch(9)
    real = mask.bool()
    a = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    b = fast(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert len(a.hidden_states) == len(b.hidden_states) == 3
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(x[real], y[real], rtol=1e-10, atol=1e-10)
    a = stock(input_ids=ids, attention_mask=mask, output_attentions=True, return_dict=False)
    b = fast(input_ids=ids, attention_mask=mask, output_attentions=True, return_dict=False)
    torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=1e-10)
    assert len(a[1]) == 2
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear, GatedLinear])
@pytest.mark.parametrize("packed", [False, True])
def test_adapted_layers(kind: type[LoRALinear], packed: bool) -> None:
    """Adapters get the same gradients, also through the shared projection call and with two-dimensional input."""
    stock = build()
    adapt(stock, kind, list(ROLES), r=2, lora_alpha=4, init_std=0.3)
    for name, p in stock.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    stock = stock.double()
    fast = copy.deepcopy(stock)
    (unpad if packed else use_fast_attention)(fast)
    ids, mask = batch(11)
    assert difference(run(stock, ids, mask, only_real=True), run(fast, ids, mask, only_real=True)) < 1e-10


def test_gradcheck_of_the_function() -> None:
    """The backward by finite differences, with dropout (same mask every time) and with packing."""
    g = torch.Generator().manual_seed(0)
    b, length, heads, size = 2, 3, 2, 2
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    masked = ~(mask[:, :, None] & mask[:, None, :])
    tokens, slots = mask.view(-1).nonzero().squeeze(-1), (mask.view(-1).cumsum(0) - 1).clamp(min=0)

    def call(packed: bool, dropout: float, q: Tensor, k: Tensor, v: Tensor, *pos: Tensor) -> Tensor:
        torch.manual_seed(3)
        where = (tokens, slots) if packed else (None, None)
        return BandedAttention.apply(q, k, v, *pos, masked, *where, 0.4, dropout)

    for packed, dropout, kinds in [
        (False, 0.0, "cp"),
        (False, 0.3, "cp"),
        (True, 0.3, "cp"),
        (True, 0.0, "c"),
        (False, 0.3, "p"),
    ]:
        rows = 5 if packed else b * length
        shapes = [rows, rows, rows, 2 * length if "c" in kinds else 0, 2 * length if "p" in kinds else 0]
        inputs = [
            torch.randn(n, heads, size, generator=g, dtype=torch.float64, requires_grad=True) if n else None
            for n in shapes
        ]
        assert torch.autograd.gradcheck(lambda *x, a=packed, d=dropout: call(a, d, *x), inputs)


def test_dropped_probabilities_with_the_same_mask_as_plain_torch() -> None:
    """Keep the dropout mask that the function drew and do the whole attention in the obvious way."""
    torch.manual_seed(0)
    b, length, heads, size, p = 2, 6, 2, 4, 0.5
    q, k, v = (torch.randn(b * length, heads, size, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pos_k, pos_q = (torch.randn(2 * length, heads, size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    masked = torch.zeros(b, length, length, dtype=torch.bool)
    masked[1, :, 4:] = True
    torch.manual_seed(7)
    actual = BandedAttention.apply(q, k, v, pos_k, pos_q, masked, None, None, 0.3, p)
    torch.manual_seed(7)
    keep = torch.native_dropout(torch.ones(heads * b, length, length, dtype=torch.float64), p, True)[1]
    assert 0 < keep.sum() < keep.numel()

    def by_head(x: Tensor) -> Tensor:  # (heads, batch, length, size)
        return x.view(b, length, heads, size).permute(2, 0, 1, 3)

    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    key_rows, query_rows = pos_k[distance + length], pos_q[distance + length]
    scores = by_head(q) @ by_head(k).transpose(2, 3)
    scores = scores + torch.einsum("hbid,ijhd->hbij", by_head(q), key_rows)
    scores = scores + torch.einsum("hbjd,ijhd->hbij", by_head(k), query_rows)
    probs = (0.3 * scores).masked_fill(masked, -1e300).softmax(-1) * keep.view(heads, b, length, length) / (1 - p)
    expected = (probs @ by_head(v)).permute(1, 2, 0, 3).reshape(b * length, heads, size)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    inputs, weight = [q, k, v, pos_k, pos_q], torch.randn_like(expected)
    for x, y in zip(
        torch.autograd.grad(actual, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_position_dropout_acts_on_rows_before_they_are_shared() -> None:
    """With a position dropout of one fixed mask, both ways of spreading give the stock result."""

    class EveryThirdColumn(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            kept = torch.ones(rows.shape[-1], dtype=rows.dtype)
            kept[::3] = 0
            return rows * kept

    for length in (6, 40):
        stock = build().double()
        for layer in stock.deberta.encoder.layer:
            layer.attention.self.pos_dropout = EveryThirdColumn()
        fast = copy.deepcopy(stock)
        use_fast_attention(fast)
        ids, mask = batch(length)
        assert difference(run(stock, ids, mask), run(fast, ids, mask)) < 1e-10


def test_dropout_leaves_the_mean_and_stops_in_eval() -> None:
    model = build(dropout=0.2, num_hidden_layers=1)
    use_fast_attention(model)
    attention = model.deberta.encoder.layer[0].attention.self
    ids, mask = batch(9)
    found: list[Tensor] = []
    attention.register_forward_hook(lambda m, a, out: found.append(out[0].detach()))
    attention.pos_dropout.p = model.deberta.embeddings.dropout.p = 0.0  # only the attention dropout
    with torch.no_grad():
        for _ in range(400):
            model(input_ids=ids, attention_mask=mask)
        many = torch.stack(found)
        model.eval()
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids, attention_mask=mask)
    assert torch.equal(found[-1], found[-2])
    error = (many.mean(0) - found[-1]) / (many.std(0) / 20 + 1e-6)  # in standard errors of a mean of 400
    assert many.std(0).min() >= 0 and many.std(0).max() > 0.01
    assert error.abs().max() < 5.5 and abs(float(error.mean())) < 0.5


def test_names_and_values_of_parameters_stay() -> None:
    model = build()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    unpad(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert copy.deepcopy(model).state_dict().keys() == after.keys()


def test_copies_and_replicas_keep_the_fast_forward() -> None:
    model = build()
    use_fast_attention(model)
    ids, mask = batch(8)
    expected = model(input_ids=ids, attention_mask=mask).logits
    twin = copy.deepcopy(model)
    replica_of = model.deberta.encoder.layer[0].attention.self
    replica = replica_of._replicate_for_data_parallel()  # what nn.DataParallel makes for every device
    assert type(replica) is type(twin.deberta.encoder.layer[0].attention.self) is FastSelfAttention
    assert replica.score_scale == replica_of.score_scale
    assert torch.equal(expected, twin(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("once", [run, classify])
def test_gradient_checkpointing(once: Any, reentrant: bool, packed: bool) -> None:
    """All tokens of the bare encoder, and the first token's way through a classifier."""
    model = build(dropout=0.1, num_hidden_layers=3).double()
    (unpad if packed else use_fast_attention)(model)
    ids, mask = batch(9)
    torch.manual_seed(5)
    plain = once(model, ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    assert difference(plain, once(model, ids, mask)) < 1e-12


def test_bfloat16_autocast_is_as_close_as_stock() -> None:
    exact = build(initializer_range=0.1).double()
    stock = copy.deepcopy(exact).float()
    fast = copy.deepcopy(stock)
    use_fast_attention(fast)
    packed = copy.deepcopy(stock)
    unpad(packed)
    ids, mask = batch(24)
    truth = run(exact, ids, mask, only_real=True)
    errors = []
    for model in (stock, fast, packed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.deberta(input_ids=ids, attention_mask=mask)[0]
        assert hidden.dtype == torch.float32
        errors.append(float(((hidden.detach() - truth[0]) * mask.unsqueeze(-1)).abs().mean()))
        (hidden.float() * mask.unsqueeze(-1)).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert 0 < max(errors[1:]) < 1.3 * errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_run(dtype: torch.dtype) -> None:
    exact = build(initializer_range=0.1).double().eval()
    model = copy.deepcopy(exact).to(dtype)
    unpad(model)
    ids, mask = batch(24)
    hidden = model.deberta(input_ids=ids, attention_mask=mask)[0]
    truth = exact.deberta(input_ids=ids, attention_mask=mask)[0]
    assert hidden.dtype == dtype
    assert ((hidden.double() - truth) * mask.unsqueeze(-1)).abs().mean() < 0.05


@pytest.mark.parametrize("kind", [LoRALinear, SVDLinear, GatedLinear])
@pytest.mark.parametrize("length", [8, 40])
def test_no_graph_break(kind: type[LoRALinear], length: int) -> None:
    model = build(dropout=0.1, num_hidden_layers=1)
    adapt(model, kind, list(ROLES), r=2, lora_alpha=4)
    use_fast_attention(model)
    ids, mask = batch(length)
    torch._dynamo.reset()
    report = torch._dynamo.explain(model)(input_ids=ids, attention_mask=mask)
    assert report.graph_count == 1 and report.graph_break_count == 0


def test_compiled_twice_is_compiled_once() -> None:
    """No recompilation for a second batch of one shape, with the hook of the classifier inside the graph."""
    model = build(num_hidden_layers=1)
    adapt(model, LoRALinear, list(ROLES), r=2, lora_alpha=4)
    use_fast_attention(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids, mask = batch(8)
    expected = model(input_ids=ids, attention_mask=mask).logits
    for _ in range(3):
        torch.testing.assert_close(compiled(input_ids=ids, attention_mask=mask).logits, expected)
    assert counter.frame_count == 1


def test_compiled_training_step_has_the_eager_gradients() -> None:
    """The whole of torch.compile but its code generator (aot_eager), also at a second, dynamic length."""
    model = build(num_hidden_layers=1).double()
    adapt(model, LoRALinear, list(ROLES), r=2, lora_alpha=4)
    use_fast_attention(model)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled.deberta.forward = torch.compile(compiled.deberta.forward, backend="aot_eager", fullgraph=True)
    for length in (6, 8, 40):
        ids, mask = batch(length)
        assert difference(run(model, ids, mask), run(compiled, ids, mask)) < 1e-10


def test_other_models_stay_stock_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    for model in (BertForSequenceClassification(BertConfig(**tiny)), build(relative_attention=False)):
        kinds = [type(m) for m in model.modules()]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert not unpad(model)
        assert len(caplog.records) == 1 and "stays stock" in caplog.text
        assert kinds == [type(m) for m in model.modules()]


def test_a_convolution_stays_padded_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    model = build(conv_kernel_size=3)
    with caplog.at_level(logging.WARNING):
        assert not unpad(model)
    assert "stay padded" in caplog.text
    assert use_fast_attention(model)


def test_query_states_run_the_stock_code() -> None:
    """The enhanced mask decoder of pre-training calls layers with their own query states."""
    stock = build().double()
    fast = copy.deepcopy(stock)
    use_fast_attention(fast)
    states, queries = torch.randn(2, 3, 7, 24, dtype=torch.float64)
    table, mask = stock.deberta.encoder.get_rel_embedding(), torch.ones(3, 1, 7, 7)
    position = build_relative_position(states, states, 16, 64)
    a, b = (
        m.deberta.encoder.layer[0](states, mask, query_states=queries, relative_pos=position, rel_embeddings=table)[0]
        for m in (stock, fast)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_band(length: int) -> None:
    """Entry (i, j) of the view is column start - i + j of row i, by plain indexing."""
    buffer = torch.arange(2 * length * 2 * length).view(2, length, 2 * length)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    for start in (length - 1, length):
        assert torch.equal(band(buffer, start), buffer[:, i, start - i + j])
