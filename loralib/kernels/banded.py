"""DeBERTa's attention with scores that are read as a band of a product, and a backward written by hand.

The stock layer multiplies every query and every key with all 2 * span relative positions, for every example, and then
gathers L of the products. Here only the rows of the table that a sequence of length L can reach are multiplied, and the
L x L scores are read from the products as a view. With d = i - j, the distance from key j to query i (DeBERTa,
arXiv 2006.03654, eq. 4):

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
numbers, cut the rest into rows of 2L - 1, and keep the first L of each row. Nothing is gathered.

In the p2c term the rows of P are keys and the distances ascend: column c belongs to distance c - L. Key j needs the
distance i - j to query i, so

    S[i, j] = P[j, L + i - j],            which lies at 2L j + L + i - j = (2L - 1) j + L + i in memory.

So the brackets begin at L instead of L - 1, and the rows of the view are keys: S is the transposed band.

The backward. Rows of 2L - 1 numbers do not overlap, so different (i, j) lie at different places: S is a selection from
P without repetition. So the gradient of P holds the gradient of S between the brackets and 0 elsewhere: it is a buffer
of zeros into which the gradient of S is copied through the same view. Nothing is scattered and nothing is summed. From
P = C T^T follow dC = dP T and dT = dP^T C, two products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def first_token_attention(
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
    """What `BandedAttention` computes for the first token of each row, from its query: (batch, heads, size)."""
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


def band(buffer: Tensor, start: int) -> Tensor:
    """View of (n, length, 2 length) as (n, length, length): entry (i, j) is buffer[i, start - i + j]."""
    n, length, width = buffer.shape
    rows = buffer.view(n, -1)[:, start : start + length * (width - 1)].view(n, length, width - 1)
    return rows[:, :, :length]


class BandedAttention(torch.autograd.Function):
    """dropout(softmax(scores)) v, with the scores of this module's docstring.

    q, k, v: (tokens, heads, size); pos_k, pos_q: (2 length, heads, size), a row for each distance -length ..
    length-1, or None; masked: (batch, length, length). The result, the context, is (tokens, heads, size). Inside, heads
    come first, n = heads * batch, so that one product with the rows of the table serves all examples. The backward
    needs q, k, v, the probabilities and the dropout mask, so these are kept; the scores and the probabilities after
    dropout are not.
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
            scores = band(bands[0], length - 1) + band(bands[1], length).transpose(1, 2)
        else:
            scores = band(bands[0], length - 1) if c2p else band(bands[0], length).transpose(1, 2)
            scores = scores.contiguous()
        del bands
        scores.baddbmm_(qkv[0], qkv[1].transpose(1, 2), beta=scale, alpha=scale)
        scores.view(heads, batch, length, length).masked_fill_(masked, torch.finfo(scores.dtype).min)
        # The dtype is given because autocast would return float32: twice the memory, for numbers that bmm rounds
        # anyway.
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
        else:  # `scale`, with which the forward multiplies all terms of the scores, joins that of dropout, 1 / (1 - p).
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
            band(bands[0], length - 1).copy_(grad_scores)
        if p2c:
            band(bands[-1], length).copy_(transposed)
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
