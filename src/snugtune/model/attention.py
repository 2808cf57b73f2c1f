"""Attention over padding-free rows: several sequences in one row, none of which sees another.

Registered with transformers' `AttentionInterface` under `NAME`. No mask function is registered under that name, so the
models build no mask and hand over `attention_mask=None`. The sequence borders come as `cu_seq_lens_q` through the
model's keyword arguments.

Shapes: H query heads, K key/value heads, G = H / K, T tokens of the row, L tokens of a sequence, d head width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snugtune.model.kernels import Setting, takes_flash
from snugtune.model.pieces import starts
from snugtune.types import MIN_ROWS

NAME = "snugtune_varlen"
FLASH = "snugtune_varlen_cuda"
"""The same on a device where flash attention runs, to trace it elsewhere: on tensors without values."""

BLOCK = 128
"""Queries of a sequence that attend at a time. On CPU blocks of 64 and 256 take longer, and so does torch's fused attention."""
SCORES = 2**25
"""Scores of all heads in a block, where sequences are so long that it would have more. Backward has three times as many."""

# Keywords that reach attention from the models but say nothing that the sequence borders do not.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions",
                       "output_hidden_states", "return_dict", "attention_type"})  # fmt: skip


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Sequence[int] | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    has_flash: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence of a packed row with itself.

    query [1, H, T, d], key and value [1, K, T, d]; returns ([1, T, H, d], None) as the interface asks. `sliding_window`
    counts the keys a query sees, itself included; `cu_seq_lens_k` are the same borders as plain numbers (reading them waits for
    no device, and they are known where tensors have no values); `softcap` is Gemma 2's tanh cap on scores; `s_aux` [H] are
    GPT-OSS's sink logits; `has_flash`: whether flash attention runs here, where the tensors do not tell. Raises `ValueError` on
    any keyword it does not know and that is not None: ignoring one is silently wrong.
    """
    strangers = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if strangers:
        raise ValueError(f"attention got keywords it does not understand: {', '.join(strangers)}")
    if attention_mask is not None:
        raise ValueError("attention got a mask; padding-free rows are separated by cu_seq_lens_q alone")
    if cu_seq_lens_q is None:
        raise ValueError("the model does not pass the sequence borders on to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (_has_flash(query) if has_flash is None else has_flash) and softcap is None and s_aux is None and not dropout:
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window), None
    borders = cu_seq_lens_q.tolist() if cu_seq_lens_k is None else cu_seq_lens_k
    how = _How(scale, sliding_window, softcap)
    outputs = []
    for start, end in pairwise(borders):
        q, k, v = query[0, :, start:end], key[0, :, start:end], value[0, :, start:end]
        outputs.append(_attended(q, k, v, s_aux, how, dropout).transpose(0, 1))
    return torch.cat(outputs).unsqueeze(0), None  # contiguous, as some models take for granted


def watching(windows: set[int | None]) -> Callable[..., tuple[Tensor, None]]:
    """`varlen_attention` that notes the windows it is given. A model may keep its window in masks alone, which we never see."""

    def attend(*inputs: Any, sliding_window: int | None = None, **others: Any) -> tuple[Tensor, None]:
        windows.add(sliding_window)
        return varlen_attention(*inputs, sliding_window=sliding_window, **others)

    return attend


def _has_flash(query: Tensor) -> bool:
    """Whether torch's variable-length flash attention runs on these."""
    if not query.is_cuda:
        return False
    return takes_flash(Setting(query.device.type, query.dtype, torch.cuda.get_device_capability(query.device)))


@dataclass(frozen=True)
class _How:
    """What there is to attention besides queries, keys and values."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def keys(self, rows: slice) -> slice:
        """The keys that queries `rows` may look at."""
        return slice(0 if self.window is None else max(0, rows.start - self.window + 1), rows.stop)

    def hidden(self, rows: slice, keys: slice, device: torch.device) -> Tensor:
        """Boolean [rows, last keys]: True where query i may not look at key j, i.e. not 0 <= i - j < window.

        Keys before those it has columns for are seen by all these queries.
        """
        whole = self.window is not None and keys.stop - keys.start > self.window
        first = keys.start if whole else rows.start
        return _hidden(rows.stop - rows.start, keys.stop - first, self.window if whole else None, device)


@functools.lru_cache(maxsize=16)
def _hidden(rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Of the last `rows` queries and `keys` keys of a sequence. Nearly all blocks have one of few sizes."""
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=device)
    ahead = hidden.triu(keys - rows + 1)
    return ahead if window is None else ahead | hidden.tril(keys - rows - window)


def forget_masks() -> None:
    """Let the next forward make its masks itself, as the first of a process does."""
    _hidden.cache_clear()


def _rows(how: _How, q: Tensor) -> int:
    """Queries of a block: as many as are quick, fewer where they would meet very many keys."""
    heads, length, _ = q.shape
    keys = length if how.window is None else min(length, how.window + BLOCK)
    return min(BLOCK, max(MIN_ROWS, SCORES // (heads * keys)))


def _blocks(how: _How, q: Tensor) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that they may look at): keys after the last query of a block need not be looked at."""
    length, most = q.shape[1], _rows(how, q)
    for start in starts(length, most, q):
        rows = slice(start, min(start + most, length))
        yield rows, how.keys(rows)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[H, l, d] -> [K, G * l, d]: heads that share keys form one tall product, so keys are never repeated."""
    return x.reshape(kv_heads, -1, x.shape[-1])


def _probs(q: Tensor, k: Tensor, sinks: Tensor | None, how: _How, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """q [K, G * l, d] scaled, k [K, j, d] -> probabilities [K, G * l, j], and the slope of the softcap, if there is one.

    With sinks there is one more column: a key per head that draws probability and gives nothing.
    """
    scores, slope = q @ k.transpose(1, 2), None
    if how.softcap is not None:
        capped = torch.tanh(scores / how.softcap)
        scores, slope = capped * how.softcap, 1.0 - capped**2
    scores = scores.view(len(k), -1, len(hidden), k.shape[1])
    scores[..., k.shape[1] - hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(len(k), -1, 1, 1).expand(-1, -1, len(hidden), 1)
        scores = torch.cat([scores, column], dim=-1)
    return F.softmax(scores, dim=-1).flatten(1, 2), slope  # its sums are in fp32, whatever the dtype


def _attended(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _How, dropout: float) -> Tensor:
    """[H, L, d] x [K, L, d] -> [H, L, d]."""
    if not dropout:
        return _Attention.apply(q, k, v, sinks, how)  # pyright: ignore[reportReturnType]
    whole = slice(0, q.shape[1])
    probs, _ = _probs(_grouped(q * how.scale, len(k)), k, sinks, how, how.hidden(whole, whole, q.device))
    return (F.dropout(probs[..., : k.shape[1]], dropout) @ v).view(*q.shape[:2], -1)


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values, and nothing of L x L: the probabilities are made again in backward, block by block."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: _How) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for rows, keys in _blocks(how, q):
            part = _grouped(q[:, rows] * how.scale, len(k))
            probs, _ = _probs(part, k[:, keys], sinks, how, how.hidden(rows, keys, q.device))
            out[:, rows] = (probs[..., : keys.stop - keys.start] @ v[:, keys]).view(len(q), -1, v.shape[-1])
            del probs  # before the next block's
        ctx.save_for_backward(q, k, v, sinks)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (q, k, v, sinks), how = ctx.saved_tensors, ctx.how
        several = q.shape[1] > _rows(how, q) or not q.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)  # what is summed over blocks
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=wide) if several else torch.empty(0) for t in (k, v))
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for rows, keys in _blocks(how, q):
            part, dout = _grouped(q[:, rows] * how.scale, len(k)), _grouped(grads[0][:, rows], len(k))
            probs, slope = _probs(part, k[:, keys], sinks, how, how.hidden(rows, keys, q.device))
            count = keys.stop - keys.start
            dv = _summed(dv, keys, probs[..., :count].transpose(1, 2) @ dout, several)
            dprobs = dout @ v[:, keys].transpose(1, 2)
            if sinks is not None:
                dprobs = F.pad(dprobs, (0, 1))
            dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            if dsinks is not None:
                dsinks += dscores[..., -1].view(len(dsinks), -1).sum(dim=1, dtype=torch.float32)
                dscores = dscores[..., :count]
            if slope is not None:
                dscores = dscores * slope
            dq[:, rows] = (dscores @ k[:, keys]).mul_(how.scale).view(len(q), -1, q.shape[-1])
            dk = _summed(dk, keys, dscores.transpose(1, 2) @ part, several)
            del probs, dprobs, dscores  # before the next block's
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks if sinks is None or dsinks is None else dsinks.to(sinks.dtype), None


def _summed(whole: Tensor, keys: slice, part: Tensor, several: bool) -> Tensor:
    """`whole` with the part of one block; the part itself, where there is but one block."""
    if several:
        whole[:, keys] += part
    return whole if several else part


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int | None, scale: float, window: int | None) -> Tensor:
    """torch's variable-length flash attention. CUDA only; not run on the machines this was written on."""
    from torch.nn.attention.varlen import varlen_attn

    longest = int(cu_seq_lens.diff().max()) if longest is None else longest
    left = -1 if window is None else window - 1
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    out = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)
