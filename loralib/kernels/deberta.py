"""Fast disentangled attention for the stock DeBERTa-v2/v3 model: same parameters, same numbers, less work.

The stock layer multiplies every query and every key with all 2 * span relative positions, for every example, and then
gathers L of the products. Here only the rows of the table that a sequence of length L can reach are projected, together
with the hidden states, and the L x L scores are read from the products as a view. With d = i - j, the distance from key
j to query i (DeBERTa, arXiv 2006.03654, eq. 4):

    scores[i, j] = (q_i . k_j + q_i . pos_k[d] + k_j . pos_q[d]) / sqrt(head size * (1 + number of position terms))
                     content        c2p              p2c

The band
--------
Let P = C T^T be the products of the contents C (L, size), here the queries, and the rows T (2L, size) of the table, in
descending order of distance: column c of P belongs to distance L - 1 - c. Query i needs distance i - j from key j, so

    S[i, j] = P[i, L - 1 - i + j],        which lies at 2L i + L - 1 - i + j = (2L - 1) i + (L - 1) + j in memory.

For L = 4, P is 4 x 8. Each number below is its place in memory, and S is what stands between the brackets:

    distance     3   2   1   0  -1  -2  -3  -4
    query 0      0   1   2 [ 3   4   5   6]  7
    query 1      8   9 [10  11  12  13] 14  15
    query 2     16 [17  18  19  20] 21  22  23
    query 3    [24  25  26  27] 28  29  30  31

The brackets begin at 3, 10, 17 and 24, always 7 = 2L - 1 further. So S is a view of P's memory: skip the first L - 1
numbers, cut the rest into rows of 2L - 1, and keep the first L of each row. Nothing is gathered. In the p2c term the
rows are keys and the distances ascend, so its brackets begin at L instead of L - 1, and S is the transposed band.

The backward. Each number of P is read once if it lies between the brackets, and otherwise never. So the gradient of P
holds the gradient of S between the brackets and 0 elsewhere: it is a buffer of zeros into which the gradient of S is
copied through the same view. Nothing is scattered and nothing is summed. From P = C T^T follow dC = dP T and
dT = dP^T C, two products.

The last layer
--------------
A sequence classifier reads the first token of the last layer and nothing else of it. There only that token's query is
computed, and only its row goes through the rest of the layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    DebertaV2ForSequenceClassification,
    DisentangledSelfAttention,
    make_log_bucket_position,
    scaled_size_sqrt,
)

from loralib.errors import InputError
from loralib.kernels.low_rank import autocast_dtype

logger = logging.getLogger(__name__)


def use_fast_attention(model: nn.Module) -> bool:
    """Let every DeBERTa-v2/v3 encoder inside `model` run its attention banded. True if there was one that can.

    Only the classes of the encoder and of its attention modules change: parameters, names, state dict, dropout
    probabilities and results (1e-10 in float64, padded rows included) stay those of the stock code. May be called
    before or after the linear layers are adapted. Other models, and encoders without relative attention, are left
    alone and a log line says so. Calls that ask for the attention matrices or bring query states run the stock code.
    In a `DebertaV2ForSequenceClassification` the last layer computes the first token alone, unless hidden states are
    asked for.
    """
    encoders: list[Any] = [module for module in model.modules() if isinstance(module, DebertaV2Encoder)]
    covered = bool(encoders) and all(
        encoder.relative_attention and _covers(layer.attention.self) for encoder in encoders for layer in encoder.layer
    )
    if not covered:
        logger.warning("Attention stays stock: the fast form needs a DeBERTa-v2/v3 encoder with c2p or p2c attention.")
        return False
    for module in model.modules():
        if isinstance(module, DebertaV2ForSequenceClassification) and type(module.deberta.encoder) is DebertaV2Encoder:
            module.register_forward_pre_hook(_ask_for_first_token, with_kwargs=True)
    for encoder in encoders:
        encoder.__class__ = FastEncoder
        encoder.first_token_only = False  # on the module itself from the start: torch.compile watches where it lives
        for layer in encoder.layer:
            attention = layer.attention.self
            attention.__class__ = FastSelfAttention
            # The stock code takes this root in float32, whatever the model's dtype: so does the fast one.
            probe = torch.empty(attention.attention_head_size, device="cpu")
            attention.score_scale = 1.0 / float(scaled_size_sqrt(probe, 1 + len(set(attention.pos_att_type))))
    return True


def unpad(model: nn.Module) -> bool:
    """Like `use_fast_attention`, and drop the padding: every token-wise layer sees (real tokens, hidden) only.

    Padding comes back inside the attention alone, up to the length of the batch handed in, so pad batches to their
    longest row. Results on real rows are those of the padded run; what the model returns for padded rows is 0. On a
    GPU a forward waits once for the number of real tokens. An encoder with a convolution needs neighbours: it stays
    padded and the log says so. Returns whether batches will be packed.
    """
    if not use_fast_attention(model):
        return False
    encoders = [module for module in model.modules() if isinstance(module, FastEncoder)]
    if any(encoder.conv is not None for encoder in encoders):
        logger.warning("Batches stay padded: this encoder has a convolution over neighbouring positions.")
        return False
    for encoder in encoders:
        encoder.unpadded = True
    return True


def _ask_for_first_token(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the encoder that the head about to run reads the first token alone (it forgets after one forward)."""
    names = ("output_attentions", "output_hidden_states")
    wanted = [getattr(model.config, name) if kwargs.get(name) is None else kwargs[name] for name in names]
    by_name = len(args) <= 6  # output_attentions would be the seventh
    model.deberta.encoder.first_token_only = by_name and not any(wanted) and model.deberta.z_steps <= 1


def _covers(attention: nn.Module) -> bool:
    kinds = set(getattr(attention, "pos_att_type", ()))
    return isinstance(attention, DisentangledSelfAttention) and bool(kinds) and kinds <= {"c2p", "p2c"}


class _Batch(NamedTuple):
    """What the layers of one forward share about its batch of (batch, length) positions."""

    masked: Tensor  # (batch, length, length) bool, True where query i may not see key j
    tokens: Tensor | None  # (tokens) place of each real token in batch * length; None: not packed
    slots: Tensor | None  # (batch * length) packed row that fills each place (padding: some row, it is masked)
    distance: Tensor | None  # (2 length) table row of each distance -length .. length-1; None: they are consecutive


class FastEncoder(DebertaV2Encoder):
    """DebertaV2Encoder that prepares mask, distances and packing once for all its layers."""

    unpadded = False
    first_token_only = False

    def forward(
        self,
        hidden_states: Tensor,  # (batch, length, hidden)
        attention_mask: Tensor,  # (batch, length) or (batch, length, length)
        output_hidden_states: bool = True,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        if output_attentions or query_states is not None or relative_pos is not None or attention_mask.dim() > 3:
            return super().forward(
                hidden_states,
                attention_mask,
                output_hidden_states,
                output_attentions,
                query_states,
                relative_pos,
                return_dict,
            )
        first_token_only, self.first_token_only = self.first_token_only, False
        batch, length = hidden_states.shape[:2]
        visible = attention_mask.bool()
        row_mask = attention_mask if visible.dim() == 2 else attention_mask.sum(-2) > 0
        tokens = slots = None
        if self.unpadded and visible.dim() == 2:
            real = visible.reshape(-1)
            tokens = real.nonzero().squeeze(-1)
            slots = (real.cumsum(0) - 1).clamp_(min=0)
            # a padded first token has no packed row of its own; the queue is empty here, so this look costs little
            if first_token_only and not bool(visible[:, 0].all()):
                raise InputError(
                    "a row of the batch begins with padding, and the model's head reads the first token: pad on the "
                    "right (tokenizer.padding_side = 'right')."
                )
        if visible.dim() == 2:
            visible = visible[:, :, None] & visible[:, None, :]
        shared = _Batch(~visible, tokens, slots, self._distance(length, hidden_states.device))

        table = self.get_rel_embedding()
        states = hidden_states if tokens is None else hidden_states.flatten(0, 1).index_select(0, tokens)
        every: list[Tensor] = [states]
        for i, layer in enumerate(self.layer):
            first = None
            if first_token_only and i == len(self.layer) - 1 and (i > 0 or self.conv is None):
                first = states[:, :1] if slots is None else states.index_select(0, slots.view(batch, length)[:, 0])
            # by position: the reentrant form of gradient checkpointing loses the gradients of keyword arguments
            states = layer(states, shared.masked, first, shared, table)[0]
            if i == 0 and self.conv is not None:
                states = self.conv(hidden_states, states, row_mask)
            every.append(states)

        hidden: Any = tuple(every)
        if first is not None:
            hidden = (states.view(batch, 1, -1),)
        elif tokens is not None:
            hidden = _Unpacked(every, tokens, (batch, length))
        last, kept = hidden[-1], hidden if output_hidden_states else None
        if not return_dict:
            return tuple(part for part in (last, kept) if part is not None)
        return BaseModelOutput(last_hidden_state=last, hidden_states=kept)

    def _distance(self, length: int, device: torch.device) -> Tensor | None:
        """Row of the table for each distance -length .. length-1; None where these are consecutive (around `span`)."""
        buckets, furthest = self.position_buckets, self.max_relative_positions
        span = buckets if buckets > 0 else furthest
        if length <= (buckets // 2 + 1 if buckets > 0 else span):
            return None
        distance = torch.arange(-length, length, device=device)
        if buckets > 0:
            distance = make_log_bucket_position(distance, buckets, furthest).long()
        return (distance + span).clamp_(0, 2 * span - 1)


class _Unpacked(Sequence):
    """The packed hidden states of all layers, each put back into (batch, length, hidden) only when asked for."""

    def __init__(self, packed: list[Tensor], tokens: Tensor, shape: tuple[int, int]) -> None:
        self.packed, self.tokens, self.shape = packed, tokens, shape

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        states = self.packed[index]
        padded = states.new_zeros(math.prod(self.shape), states.shape[-1])
        return padded.index_copy(0, self.tokens, states).view(*self.shape, -1)


class FastSelfAttention(DisentangledSelfAttention):
    """DisentangledSelfAttention whose position terms are read as a band; for anything but `FastEncoder` it is stock."""

    score_scale: float

    def forward(
        self,
        hidden_states: Tensor,  # (batch, length, hidden), or (tokens, hidden) when packed
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,  # the first tokens, (batch, 1, hidden) or (batch, hidden), or None for all
        relative_pos: Any = None,
        rel_embeddings: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(relative_pos, _Batch):
            return super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        masked, tokens, slots, distance = relative_pos  # unpacked: the compiler of torch 2.8 cannot slice it
        length, span = masked.shape[-1], self.pos_ebd_size
        c2p, p2c = "c2p" in self.pos_att_type, "p2c" in self.pos_att_type
        states = hidden_states.view(-1, hidden_states.shape[-1])
        asking = states if query_states is None else query_states.reshape(-1, hidden_states.shape[-1])
        # Dropout acts on rows of the table, before distances that share a bucket share a row.
        rows = self.pos_dropout(
            rel_embeddings[span - length : span + length] if distance is None else rel_embeddings[: 2 * span]
        )

        if (half := autocast_dtype(states)) is not None:  # once, not in each of the projections
            states, rows = states.to(half), rows.to(half)
            asking = states if query_states is None else asking.to(half)

        pos_q = pos_k = None
        if self.share_att_key:  # hidden states and table in one call of each projection, and so of its adapter
            both = torch.cat([states, rows])
            pair = both if query_states is None else torch.cat([asking, rows])
            query, pos_q = self._heads(self.query_proj(pair)).split([asking.shape[0], rows.shape[0]])
            key, pos_k = self._heads(self.key_proj(both)).split([states.shape[0], rows.shape[0]])
        else:
            query, key = self._heads(self.query_proj(asking)), self._heads(self.key_proj(states))
            pos_k = self._heads(self.pos_key_proj(rows)) if c2p else None
            pos_q = self._heads(self.pos_query_proj(rows)) if p2c else None
        value = self._heads(self.value_proj(states))
        pos_k = self._spread(pos_k, distance) if c2p else None
        pos_q = self._spread(pos_q, distance) if p2c else None

        dropout = self.dropout.p if self.training else 0.0
        attend = _BandedAttention.apply if query_states is None else _first_token_attention
        context = attend(query, key, value, pos_k, pos_q, masked, tokens, slots, self.score_scale, dropout)
        return context.reshape(*(hidden_states if query_states is None else query_states).shape[:-1], -1), None

    def _heads(self, x: Tensor) -> Tensor:
        """(rows, heads * size) -> (rows, heads, size)"""
        return x.view(x.shape[0], self.num_attention_heads, -1)

    @staticmethod
    def _spread(rows: Any, distance: Tensor | None) -> Tensor:
        """Rows of the table -> a row for each distance."""
        return rows if distance is None else rows.index_select(0, distance)


def _first_token_attention(
    query: Tensor,  # (batch, heads, size)
    key: Tensor,  # (tokens, heads, size)
    value: Tensor,
    pos_k: Tensor | None,
    pos_q: Tensor | None,
    masked: Tensor,
    tokens: Tensor | None,
    slots: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Row 0 of what `_BandedAttention` computes, from the queries of the first tokens: (batch, heads, size)."""
    batch, length = masked.shape[:2]
    if slots is not None:
        key, value = key.index_select(0, slots), value.index_select(0, slots)
    key, value = (x.view(batch, length, *x.shape[1:]) for x in (key, value))
    scores = torch.einsum("bhd,bjhd->bhj", query, key)
    if pos_k is not None:  # key j lies at distance -j
        scores = scores + torch.einsum("bhd,jhd->bhj", query, pos_k[1 : length + 1].flip(0))
    if pos_q is not None:
        scores = scores + torch.einsum("bjhd,jhd->bhj", key, pos_q[1 : length + 1].flip(0))
    scores = (scores * scale).masked_fill(masked[:, :1], torch.finfo(scores.dtype).min)
    probs = torch.dropout(torch.softmax(scores, -1, dtype=scores.dtype), dropout, dropout > 0)
    return torch.einsum("bhj,bjhd->bhd", probs, value)


def _band(buffer: Tensor, start: int) -> Tensor:
    """View of (n, length, 2 length) as (n, length, length): entry (i, j) is buffer[i, start - i + j], see above."""
    n, length, width = buffer.shape
    rows = buffer.view(n, -1)[:, start : start + length * (width - 1)].view(n, length, width - 1)
    return rows[:, :, :length]


class _BandedAttention(torch.autograd.Function):
    """dropout(softmax(scores)) v with the scores of the module's docstring, the backward written by hand.

    q, k, v: (tokens, heads, size); pos_k, pos_q: (2 length, heads, size), a row for each distance -length ..
    length-1, or None; masked: (batch, length, length). Returns the context (tokens, heads, size). Everything inside is
    head-major, n = heads * batch, so that one product with the rows of the table serves all examples. Kept for the
    backward: q, k, v, the probabilities and the dropout mask; the scores and the dropped probabilities are not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_k: Tensor | None,
        pos_q: Tensor | None,
        masked: Tensor,
        tokens: Tensor | None,
        slots: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        heads, size = q.shape[1:]
        batch, length = masked.shape[:2]
        n, c2p, p2c = heads * batch, pos_k is not None, pos_q is not None

        qkv = torch.stack([q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)])  # (3, heads, tokens, size)
        if slots is not None:
            qkv = qkv.index_select(2, slots)
        qkv = qkv.view(3, n, length, size)
        # The band of c2p runs over descending distances, that of p2c, whose rows are keys, over ascending ones.
        rows = [pos_k.flip(0)] if pos_k is not None else []
        rows += [pos_q] if pos_q is not None else []
        pos = torch.stack([p.transpose(0, 1) for p in rows]).flatten(0, 1)
        content = qkv[0 if c2p else 1 : 2 if p2c else 1].reshape(pos.shape[0], batch * length, size)
        bands = torch.bmm(content, pos.transpose(1, 2)).view(c2p + p2c, n, length, 2 * length)
        if c2p and p2c:
            scores = _band(bands[0], length - 1) + _band(bands[1], length).transpose(1, 2)
        else:
            scores = _band(bands[0], length - 1) if c2p else _band(bands[0], length).transpose(1, 2)
            scores = scores.contiguous()
        del bands
        scores.baddbmm_(qkv[0], qkv[1].transpose(1, 2), beta=scale, alpha=scale)
        scores.view(heads, batch, length, length).masked_fill_(masked, torch.finfo(scores.dtype).min)
        # dtype said: autocast would answer in float32, which doubles the memory for numbers that bmm rounds anyway
        probs = torch.softmax(scores, -1, dtype=scores.dtype)
        dropped, kept = torch.native_dropout(probs, dropout, True) if dropout > 0 else (probs, None)

        context = torch.bmm(dropped, qkv[2]).view(heads, batch * length, size).transpose(0, 1)
        ctx.save_for_backward(qkv, pos, probs, kept, masked, tokens)
        ctx.c2p, ctx.p2c, ctx.scale, ctx.dropout = c2p, p2c, scale, dropout
        return context.contiguous() if tokens is None else context.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, pos, probs, kept, masked, tokens = ctx.saved_tensors
        c2p, p2c, scale = ctx.c2p, ctx.p2c, ctx.scale
        n, length, size = qkv.shape[1:]
        batch = masked.shape[0]
        heads = n // batch
        q, k, v = qkv[0], qkv[1], qkv[2]
        grad = grad.transpose(0, 1)  # (heads, tokens, size)
        if tokens is None:
            grad = grad.reshape(n, length, size)
        else:
            grad = grad.new_zeros(heads, batch * length, size).index_copy_(1, tokens, grad).view(n, length, size)

        grad_probs = torch.bmm(grad, v.transpose(1, 2))
        if kept is None:
            dropped, grad_probs = probs, grad_probs.mul_(scale)
        else:  # softmax's backward is linear: the scores' 1 / sqrt(..) rides on the dropout's 1 / (1 - p)
            keep_scale = 1.0 / (1.0 - ctx.dropout) if ctx.dropout < 1 else 0.0
            dropped = torch.ops.aten.native_dropout_backward(probs, kept, keep_scale)
            grad_probs = torch.ops.aten.native_dropout_backward(grad_probs, kept, keep_scale * scale)
        grad_v = torch.bmm(dropped.transpose(1, 2), grad)
        grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        del dropped, grad_probs
        grad_scores.view(heads, batch, length, length).masked_fill_(masked, 0.0)
        transposed = grad_scores.transpose(1, 2)

        bands = grad_scores.new_zeros(c2p + p2c, n, length, 2 * length)
        if c2p:
            _band(bands[0], length - 1).copy_(grad_scores)
        if p2c:
            _band(bands[-1], length).copy_(transposed)
        bands = bands.view(pos.shape[0], batch * length, 2 * length)
        content = qkv[0 if c2p else 1 : 2 if p2c else 1].reshape(pos.shape[0], batch * length, size)
        grad_pos = torch.bmm(bands.transpose(1, 2), content).view(c2p + p2c, heads, 2 * length, size).transpose(1, 2)
        grad_content = torch.bmm(bands, pos).view(c2p + p2c, n, length, size)
        del bands
        grad_q = grad_content[0].baddbmm_(grad_scores, k) if c2p else torch.bmm(grad_scores, k)
        grad_k = grad_content[-1].baddbmm_(transposed, q) if p2c else torch.bmm(transposed, q)

        def rows(x: Tensor) -> Tensor:  # (n, length, size) -> (tokens, heads, size)
            x = x.view(heads, batch * length, size).transpose(0, 1)
            return x if tokens is None else x.index_select(0, tokens)

        grad_pos_k, grad_pos_q = grad_pos[0].flip(0) if c2p else None, grad_pos[-1] if p2c else None
        return rows(grad_q), rows(grad_k), rows(grad_v), grad_pos_k, grad_pos_q, None, None, None, None, None
