"""Attention over padding-free rows: several sequences in one row, none of which sees another.

Registered with transformers' `AttentionInterface` under `NAME`. No mask function is registered under that name, so the
models build no mask and hand over `attention_mask=None`. The sequence borders come as `cu_seq_lens_q` through the
model's keyword arguments.

Shapes: H query heads, K key/value heads, G = H / K, T tokens of the row, L tokens of a sequence, d head width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "snugtune_varlen"

# Below this length the grouped eager path beats SDPA on CPU; above it, its L x L scores cost too much memory.
EAGER_MAX_LENGTH = 1024

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
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence of a packed row with itself.

    query [1, H, T, d], key and value [1, K, T, d]; returns ([1, T, H, d], None) as the interface asks. `sliding_window`
    counts the keys a query sees, itself included; `cu_seq_lens_k` holds the same borders on the host (reading them there
    waits for no device); `softcap` is Gemma 2's tanh cap on scores; `s_aux` [H] are GPT-OSS's
    sink logits. Raises `ValueError` on any keyword it does not know and that is not None: ignoring one is silently wrong.
    """
    strangers = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if strangers:
        raise ValueError(f"attention got keywords it does not understand: {', '.join(strangers)}")
    if attention_mask is not None:
        raise ValueError("attention got a mask; padding-free rows are separated by cu_seq_lens_q alone")
    if cu_seq_lens_q is None:
        raise ValueError("the model does not pass the sequence borders on to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _has_flash(query) and softcap is None and s_aux is None and not dropout:
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window), None
    borders = (cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k).tolist()
    eager_only = softcap is not None or s_aux is not None
    outputs = []
    for start, end in pairwise(borders):
        q, k, v = query[0, :, start:end], key[0, :, start:end], value[0, :, start:end]
        if eager_only or end - start <= EAGER_MAX_LENGTH:
            out = _eager(q, k, v, scale, sliding_window, softcap, s_aux, dropout)
        else:
            out = _sdpa(q, k, v, scale, sliding_window, dropout)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs).unsqueeze(0), None  # contiguous, as some models take for granted


def watching(windows: set[int | None]) -> Callable[..., tuple[Tensor, None]]:
    """`varlen_attention` that notes the windows it is given. A model may keep its window in masks alone, which we never see."""

    def attend(*inputs: Any, sliding_window: int | None = None, **others: Any) -> tuple[Tensor, None]:
        windows.add(sliding_window)
        return varlen_attention(*inputs, sliding_window=sliding_window, **others)

    return attend


def _has_flash(query: Tensor) -> bool:
    """Whether torch's variable-length flash attention runs on these: Ampere or newer, 16 bit."""
    return query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [L, L]: True where query i may look at key j, i.e. 0 <= i - j < window."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed if window is None or window >= length else allowed.triu(1 - window)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None, dropout: float
) -> Tensor:
    """[H, L, d] x [K, L, d] -> [H, L, d]. Heads that share keys form one tall GEMM, so keys are never repeated."""
    (heads, length, width), kv_heads = q.shape, k.shape[0]
    grouped = q.reshape(kv_heads, -1, width)  # [K, G * L, d]
    scores = (grouped @ k.transpose(1, 2) * scale).view(kv_heads, -1, length, length)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_causal(length, window, q.device), float("-inf"))
    if sinks is not None:  # one more key per head that draws probability and gives nothing
        column = sinks.to(scores.dtype).view(kv_heads, -1, 1, 1).expand(-1, -1, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)[..., :length]
    probs = F.dropout(probs, dropout)
    return (probs.reshape(kv_heads, -1, length) @ v).view(heads, length, v.shape[-1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
    """As `_eager` without cap and sinks, in memory linear in L."""
    windowed = window is not None and window < q.shape[1]
    mask = _causal(q.shape[1], window, q.device) if windowed else None
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, dropout_p=dropout, is_causal=not windowed, scale=scale, enable_gqa=True
    )[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, longest: int | None, scale: float, window: int | None) -> Tensor:
    """torch's variable-length flash attention. CUDA only; not run on the machines this was written on."""
    from torch.nn.attention.varlen import varlen_attn

    longest = int(cu_seq_lens.diff().max()) if longest is None else longest
    left = -1 if window is None else window - 1
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    out = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scale, window_size=(left, 0), enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)
