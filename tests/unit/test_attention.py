"""The attention function of padding-free rows, against transformers' own models and against dense fp64 attention."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from conftest import packed as pack
from conftest import sequences, tiny_base, tiny_model
from snugtune.model import attention
from snugtune.model.attention import BLOCK, varlen_attention

LENGTHS = (1, 13, 1, 7, 2)  # single tokens first and between; 13 and 7 are longer than the windows of 5
BLOCKS = pytest.mark.parametrize("block", [BLOCK, 4], ids=["one block", "several"])


@BLOCKS
@pytest.mark.parametrize(
    "arch",
    ["llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "gpt2", "gptoss", "opt", "neox", "cohere", "granite", "afmoe"],
)
def test_packed_rows_give_each_sequence_the_logits_it_has_alone(arch: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is an untouched model with its native attention, one sequence at a time."""
    monkeypatch.setattr(attention, "BLOCK", block)
    parts = sequences(*LENGTHS)
    native, base = tiny_model(arch), tiny_base(arch)
    with torch.no_grad():
        truth = torch.cat([native(input_ids=p[None]).logits[0] for p in parts])
        ours = base.head.logits(base.hidden(pack(parts)))
    assert base.packable
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Textbook attention over the whole row at once in fp64: keys repeated, a full mask. [1, H, T, d] -> [1, T, H, d]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(len(owner))[:, None], torch.arange(len(owner))[None, :]
    allowed = (owner[:, None] == owner[None, :]) & (j <= i) & (i - j < (window or len(owner)))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, len(owner), 1)], dim=-1)
    probs = scores.softmax(-1)[..., : len(owner)]
    return torch.einsum("bhij,bhjd->bihd", probs, v)


def _compare(
    lengths: tuple[int, ...],
    kv_heads: int,
    window: int | None = None,
    cap: float | None = None,
    with_sinks: bool = False,
    scale: float | None = None,
) -> None:
    """Output and all gradients of one call in fp32 against `_dense` in fp64."""
    generator = torch.Generator().manual_seed(0)
    heads, width, total = 4, 8, sum(lengths)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw(1, heads, total, width), draw(1, kv_heads, total, width), draw(1, kv_heads, total, width)]
    inputs += [draw(heads)] if with_sinks else []
    direction = draw(1, total, heads, width)
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    exact = [t.clone().requires_grad_() for t in inputs]
    sinks = exact[3] if with_sinks else None
    truth = _dense(exact[0], exact[1], exact[2], lengths, width**-0.5 if scale is None else scale, window, cap, sinks)
    (truth * direction).sum().backward()

    ours = [t.float().requires_grad_() for t in inputs]
    out, weights = varlen_attention(
        nn.Identity(), *ours[:3], None, cu_seq_lens_q=borders, cu_seq_lens_k=borders.tolist(), max_length_q=max(lengths),
        scaling=scale, sliding_window=window, softcap=cap, s_aux=ours[3] if with_sinks else None,
    )  # fmt: skip
    (out * direction.float()).sum().backward()
    assert weights is None
    torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-5)
    for mine, exactly in zip(ours, exact, strict=True):
        assert mine.grad is not None and exactly.grad is not None
        torch.testing.assert_close(mine.grad, exactly.grad.float(), rtol=1e-5, atol=1e-5)


@BLOCKS
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_grouped_windowed_causal_attention(
    kv_heads: int, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    _compare(LENGTHS, kv_heads, window)
    _compare(LENGTHS, kv_heads, window, scale=0.7)


@BLOCKS
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("cap", "with_sinks"), [(1.5, False), (None, True), (1.5, True)], ids=["softcap", "sinks", "both"])
def test_cap_and_sinks_are_honoured_at_any_length(
    cap: float | None, with_sinks: bool, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    _compare(LENGTHS, 2, window, cap, with_sinks)


@pytest.mark.parametrize("window", [None, 200])
def test_rows_with_short_and_long_sequences(window: int | None) -> None:
    """The real limit, and fewer queries a block where they meet very many keys."""
    _compare((3, 2 * BLOCK + 6), 2, window)


def test_few_queries_at_a_time_where_there_are_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of a block stay within `SCORES`, down to the rows that products need."""
    monkeypatch.setattr(attention, "SCORES", 4 * 150 * 32)
    sizes = list[int]()
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(attention.F, "softmax", lambda x, dim: (sizes.append(x.numel()), softmax(x, dim))[1])
    _compare((150,), 2, None)
    assert max(sizes) <= attention.SCORES
    assert len(sizes) == 2 * 5  # forward and backward: 32 queries at a time


@pytest.mark.parametrize("cap", [None, 2.0])
def test_nothing_is_kept_for_backward_that_grows_with_the_square_of_the_length(cap: float | None) -> None:
    """Queries, keys and values are, as they came: no copies."""
    q, k, v = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    kept = dict[int, int]()

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        leaves = [t.requires_grad_() for t in (q, k, v)]
        varlen_attention(nn.Identity(), *leaves, None, cu_seq_lens_q=torch.tensor([0, 40, 300]), softcap=cap)
    assert kept == {t.untyped_storage().data_ptr(): t.nbytes for t in (q, k, v)}


def _call(**keywords: object) -> Tensor:
    q = torch.ones(1, 2, 4, 8)
    keywords = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 3, 4])} | keywords
    return varlen_attention(nn.Identity(), q, q, q, **keywords)[0]


def test_an_unknown_keyword_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="position_bias"):
        _call(position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="head_mask, position_bias"):
        _call(position_bias=0.0, head_mask=False)  # falsy is not None


def test_an_unknown_keyword_that_is_none_says_nothing() -> None:
    assert torch.equal(_call(position_bias=None), _call())


def test_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="mask"):
        _call(attention_mask=torch.zeros(1, 1, 4, 4))


def test_borders_are_required() -> None:
    """Without them neighbours would see each other."""
    q = torch.ones(1, 2, 4, 8)
    with pytest.raises(ValueError, match="does not pass the sequence borders"):
        varlen_attention(nn.Identity(), q, q, q, None)


@BLOCKS
def test_dropout_reaches_the_probabilities(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over constant values attention gives the sum of the probabilities: 1 without dropout, 1 on average with it."""
    monkeypatch.setattr(attention, "BLOCK", block)
    q, ones = torch.randn(1, 4, 64, 8), torch.ones(1, 4, 64, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out, _ = varlen_attention(nn.Identity(), q, q, ones, None, cu_seq_lens_q=torch.tensor([0, 64]), dropout=0.5)
    assert out.std() > 0.1
    assert abs(float(out.mean()) - 1.0) < 0.1


@BLOCKS
def test_a_sequence_has_the_same_bits_beside_any_neighbours(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What joint training rests on; a neighbour's NaN does not pass either."""
    monkeypatch.setattr(attention, "BLOCK", block)
    parts = [[torch.randn(1, h, n, 8) for h in (4, 2, 2)] for n in (6, 11, 3)]
    parts[2] = [t * float("nan") for t in parts[2]]
    q, k, v = (torch.cat(column, dim=2) for column in zip(*parts, strict=True))
    together, _ = varlen_attention(nn.Identity(), q, k, v, None, cu_seq_lens_q=torch.tensor([0, 6, 17, 20]))
    for (start, end), (q, k, v) in zip(pairwise((0, 6, 17)), parts[:2], strict=True):
        alone, _ = varlen_attention(nn.Identity(), q, k, v, None, cu_seq_lens_q=torch.tensor([0, end - start]))
        assert torch.equal(together[:, start:end], alone)


def test_the_output_is_contiguous_as_that_of_transformers_own_functions() -> None:
    """Models may `.view` it (AFMoE, JetMoE do)."""
    q, kv = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    out, _ = varlen_attention(nn.Identity(), q, kv, kv, None, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    assert out.shape == (1, 9, 4, 8)
    assert out.is_contiguous()
