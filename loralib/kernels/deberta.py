"""Fast disentangled attention for the stock DeBERTa-v2/v3 model: same parameters and function, less work.

- `use_fast_attention`: an encoder prepares mask and distances once for all its layers. Hidden states, and the rows of
  the table of positions that the batch can reach, go through each projection together, and `loralib.kernels.banded`
  computes the attention.
- `unpad`: the layers outside of the attention see only the real tokens.
- A sequence classifier reads the first token of the last layer and nothing else of it. In that layer only this token's
  query is computed, and only its row goes through the rest of the layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    DebertaV2ForSequenceClassification,
    DisentangledSelfAttention,
    make_log_bucket_position,
    scaled_size_sqrt,
)

from loralib.errors import InputError
from loralib.kernels.banded import BandedAttention, first_token_attention
from loralib.kernels.low_rank import autocast_dtype

logger = logging.getLogger(__name__)


def use_fast_attention(model: nn.Module) -> bool:
    """Let every DeBERTa-v2/v3 encoder inside `model` compute its attention as a band.

    Only the classes of the encoder and of its attention modules change. Parameters, names, state dict, dropout
    probabilities and results (1e-10 in float64, padded rows included) stay those of the stock code. The linear layers
    may be adapted before or after this call. A call of the model that asks for the attention matrices or brings query
    states runs the stock code. In a `DebertaV2ForSequenceClassification` the last layer computes only the first token,
    unless hidden states are asked for.

    Returns:
        Whether the model has such an encoder. Other models, and encoders without relative attention, stay as they are,
        and the log says so.
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
        encoder.first_token_only = False  # set on the module from the start: torch.compile watches where it lives
        for layer in encoder.layer:
            attention = layer.attention.self
            attention.__class__ = FastSelfAttention
            # The stock code takes this root in float32 for every dtype of the model, and so does the fast one.
            probe = torch.empty(attention.attention_head_size, device="cpu")
            attention.score_scale = 1.0 / float(scaled_size_sqrt(probe, 1 + len(set(attention.pos_att_type))))
    return True


def unpad(model: nn.Module) -> bool:
    """Do what `use_fast_attention` does, and drop the padding: layers outside of the attention see (tokens, hidden).

    Inside the attention the padding is put back, up to the length of the batch, so pad batches to their longest row.
    The results of real tokens are those of the padded run; for padding the model returns 0. On a GPU each forward waits
    once for the number of real tokens.

    Returns:
        Whether padding will be dropped. An encoder with a convolution needs the neighbours of a token, so it keeps the
        padding, and the log says so.
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
    """Tell the encoder that the head reads only the first token. The encoder forgets this after one forward."""
    names = ("output_attentions", "output_hidden_states")
    wanted = [getattr(model.config, name) if kwargs.get(name) is None else kwargs[name] for name in names]
    by_name = len(args) <= 6  # output_attentions would be the seventh
    model.deberta.encoder.first_token_only = by_name and not any(wanted) and model.deberta.z_steps <= 1


def _covers(attention: nn.Module) -> bool:
    kinds = set(getattr(attention, "pos_att_type", ()))
    return isinstance(attention, DisentangledSelfAttention) and bool(kinds) and kinds <= {"c2p", "p2c"}


class _Batch(NamedTuple):
    """What all layers of one forward need to know of its batch of (batch, length) positions."""

    masked: Tensor  # (batch, length, length) bool, True where query i may not see key j
    tokens: Tensor | None  # (tokens) place of each real token in batch * length; None: padding is not dropped
    slots: Tensor | None  # (batch * length) real token that fills each place; in padding any, since it is masked
    distance: Tensor | None  # (2 length) table row of each distance -length .. length-1; None: they are consecutive


class FastEncoder(DebertaV2Encoder):
    """A DebertaV2Encoder that prepares mask, distances and places of the real tokens once for all its layers."""

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
            # A first token that is padding has no row among the real tokens. Nothing is queued on the GPU yet, so
            # reading this costs little.
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
            # By position: the reentrant form of gradient checkpointing loses the gradients of keyword arguments.
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
    """The hidden states of all layers, (tokens, hidden). Each becomes (batch, length, hidden) only when it is read."""

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
    """A DisentangledSelfAttention whose position terms are read as a band. Only `FastEncoder` calls it in that way; any
    other call runs the stock code."""

    score_scale: float

    def forward(
        self,
        hidden_states: Tensor,  # (batch, length, hidden), or (tokens, hidden) without padding
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

        if (half := autocast_dtype(states)) is not None:  # cast once, not in each of the projections
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
        attend = BandedAttention.apply if query_states is None else first_token_attention
        context = attend(query, key, value, pos_k, pos_q, masked, tokens, slots, self.score_scale, dropout)
        return context.reshape(*(hidden_states if query_states is None else query_states).shape[:-1], -1), None

    def _heads(self, x: Tensor) -> Tensor:
        """(rows, heads * size) -> (rows, heads, size)"""
        return x.view(x.shape[0], self.num_attention_heads, -1)

    @staticmethod
    def _spread(rows: Any, distance: Tensor | None) -> Tensor:
        """Rows of the table -> a row for each distance."""
        return rows if distance is None else rows.index_select(0, distance)
