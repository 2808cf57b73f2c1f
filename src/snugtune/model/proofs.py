"""What is tried on a model once, when it is loaded: what its config says is not enough to train it right.

Every function looks at a model in its native attention and leaves it as it was. `body` is the part of the model that gives
hidden states, or None. Shapes: T tokens of a row, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from snugtune.errors import InputError, SnugtuneError
from snugtune.model import attention
from snugtune.model.frozen import FrozenLinear
from snugtune.model.head import Logits
from snugtune.types import MIN_ROWS, Batch

_PROOF = f"{attention.NAME}_proof"
# RoPE variants whose angles depend on the length of the whole row, not on positions alone.
_ROW_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
# Mixers that carry a state along the row.
_STATEFUL_LAYERS = ("linear_attention", "mamba", "ssm", "conv", "recurrent", "hybrid", "chunked_attention")
# Packed against separate: the relative L2 difference of hidden states that rounding alone explains, by dtype.
_PROOF_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}

_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Proved:
    """What a model was seen to be. `obstacle`: why sequences cannot share a row; `apart`: why several jobs cannot share a

    forward; `head`: the output projection and what becomes of its product, where these give the model's own logits.
    """

    read_past: frozenset[str]
    obstacle: str | None
    apart: str | None
    head: tuple[nn.Module, Logits] | None


def prove(model: PreTrainedModel, body: PreTrainedModel | None, linears: Sequence[str], name: str) -> Proved:
    """Try what config and names do not tell: causality, what is called in training, packing, the head.

    Raises `InputError` for weights that are damaged and models that are not causal.
    """
    moe = experts_of(model.config) is not None
    if not is_finite(model, body):
        raise InputError(f"model: the weights of '{name}' give states that are not finite; its files may be damaged")
    if sees_ahead(model, body, moe):
        kind = model.config.model_type
        raise InputError(f"model: '{name}' ({kind}) is not a causal language model: its tokens see those after them")
    past = read_past(model, linears)
    obstacle = packing_obstacle(model, body, moe)
    return Proved(past, obstacle, obstacle or obstacle_to_sharing(model.config), plain_head(model, body))


def presume(model: PreTrainedModel, body: PreTrainedModel | None) -> Proved:
    """What a model's config lets one expect of it, before it has weights."""
    obstacle, project = _known_obstacle(model), model.get_output_embeddings()
    head = None if body is None or project is None else (project, _logit_shapes(model.config)[-1])
    return Proved(frozenset(), obstacle, obstacle or obstacle_to_sharing(model.config), head)


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The number format that the model computes in."""
    return model.get_input_embeddings().weight.dtype  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]


def vocab_size_of(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportReturnType, reportIndexIssue]


def states(model: PreTrainedModel, body: PreTrainedModel | None, **inputs: object) -> Tensor:
    """The last hidden states [T, D], or the logits [T, V] of a model without a body.

    A residual kept in fp32 goes to the head in the model's dtype.
    """
    if body is None:
        return model(**inputs, use_cache=False).logits[0]
    return body(**inputs, use_cache=False).last_hidden_state[0].to(dtype_of(model))


def borders(batch: Batch, device: torch.device) -> dict[str, object]:
    """The keywords that tell our attention where the sequences of a row begin and end."""
    starts, longest = tuple(accumulate(batch.lengths, initial=0)), max(batch.lengths)
    there = torch.tensor(starts, dtype=torch.int32, device=device)
    return {"position_ids": batch.position_ids, "cu_seq_lens_q": there, "cu_seq_lens_k": starts,
            "max_length_q": longest, "max_length_k": longest}  # fmt: skip


def is_finite(model: PreTrainedModel, body: PreTrainedModel | None) -> bool:
    """Whether a short text gives finite states; damaged weights do not."""
    with _mode(model, training=False):
        return bool(states(model, body, input_ids=probe_batch(model).input_ids[:, :17]).isfinite().all())


def sees_ahead(model: PreTrainedModel, body: PreTrainedModel | None, moe: bool) -> bool:
    """Whether later tokens change earlier states: such a model knows the answers it is to learn."""
    ids = probe_batch(model).input_ids[:, :17]
    with _mode(model, training=False):
        whole, part = (states(model, body, input_ids=ids[:, :n])[:9] for n in (17, 9))
    return _relative(part, whole, per_token=moe) > _PROOF_TOLERANCE[dtype_of(model)]


def read_past(model: PreTrainedModel, linears: Sequence[str]) -> frozenset[str]:
    """The linears that a forward in training does not call: an adapter on one would never learn."""
    called: set[str] = set()
    ids = probe_batch(model).input_ids[:, :17]
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name in linears]
    try:
        with _mode(model, training=True), torch.random.fork_rng():
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(linears) - called


def packing_obstacle(model: PreTrainedModel, body: PreTrainedModel | None, moe: bool) -> str | None:
    """Why sequences must not share a row: by rule, else by trying. None when they may."""
    return _known_obstacle(model) or _seen_obstacle(model, body, moe)


def experts_of(config: PretrainedConfig) -> int | None:
    """How many experts a layer chooses from; None where it is no mixture."""
    counts = (getattr(config, k, None) for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    return next((c for c in counts if isinstance(c, int) and c > 1), None)


def obstacle_to_sharing(config: PretrainedConfig) -> str | None:
    """Why several jobs cannot share a forward of such a model, as far as its config tells."""
    if experts_of(config) is not None:
        return "its experts see the rows of all jobs"
    return _obstacle_in(config)


def rows_are_independent(model: PreTrainedModel, names: Iterable[str], most: int) -> bool:
    """Whether a row has the same bits wherever it stands among how many others, from `MIN_ROWS` to `most`.

    In the products of the linears `names`. That is a property of this machine's library and its number of threads: it is
    tried on random numbers, forth and back. And of widths: products take rows that begin at odd addresses in another way.
    """
    dtype, device = dtype_of(model), model.device
    shapes = sorted({FrozenLinear.shape_of(model.get_submodule(name)) for name in names})
    if any(width * dtype.itemsize % _ALIGNED for shape in shapes for width in shape):
        return False
    generator = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        return torch.randn(most, width, generator=generator).to(device, dtype)

    for out, into in shapes:
        weight = torch.randn(out, into, generator=generator).to(device, dtype)
        forth, back = partial(torch.matmul, other=weight.t()), partial(torch.matmul, other=weight)
        if not (_same_bits(forth, rows(into)) and _same_bits(back, rows(out))):
            return False
    return True


def _same_bits(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether rows [most, n] give the same when they come in parts, at whatever place."""
    most, whole = len(x), function(x)
    counts = {MIN_ROWS, MIN_ROWS + 1, 61, most // 3, most // 2} & set(range(MIN_ROWS, most + 1))
    for count in sorted(counts):
        for start in (0, most - count, (most - count) // 2):
            part = slice(start, start + count)
            if not torch.equal(function(x[part].clone()), whole[part]):
                return False
    return True


def plain_head(model: PreTrainedModel, body: PreTrainedModel | None) -> tuple[nn.Module, Logits] | None:
    """The output projection and what becomes of its product, if they reproduce the model's own logits."""
    project = model.get_output_embeddings()
    if body is None or project is None:
        return None
    batch = probe_batch(model)
    ids = batch.input_ids[:, : batch.lengths[0]]
    with _mode(model, training=False):
        own = model(input_ids=ids, use_cache=False).logits[0]
        try:
            raw = project(states(model, body, input_ids=ids))
        except RuntimeError:  # its projection does not even fit the hidden states: the head is something else
            return None
    if raw.shape != own.shape:
        return None
    errors = {shape: _relative(shape(raw), own) for shape in _logit_shapes(model.config)}
    best = min(errors, key=lambda shape: errors[shape])
    return (project, best) if errors[best] <= _PROOF_TOLERANCE[dtype_of(model)] else None


@contextmanager
def _mode(model: PreTrainedModel, training: bool) -> Iterator[None]:
    """In train or in eval mode and without gradients, inside the block."""
    before = model.training
    model.train(training)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def _known_obstacle(model: PreTrainedModel) -> str | None:
    """Why sequences must not share a row, as far as the config tells; leaks that show only at length are found here."""
    if getattr(model, "_is_stateful", False):
        return "it carries a state along the row"
    if (told := _obstacle_in(model.config)) is not None:
        return told
    return None if model._supports_attention_backend else "its attention is not replaceable"


def _obstacle_in(config: PretrainedConfig) -> str | None:
    kinds = [str(k) for k in getattr(config, "layer_types", None) or ()]
    stateful = [k for k in kinds if any(word in k for word in _STATEFUL_LAYERS)]
    if stateful:
        return f"it has {stateful[0]} layers"
    if getattr(config, "alibi", False):
        return "ALiBi positions"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if part.get("rope_type") in _ROW_DEPENDENT_ROPE:
            return f"{part['rope_type']} RoPE depends on the row's length"
    return None


def _seen_obstacle(model: PreTrainedModel, body: PreTrainedModel | None, moe: bool) -> str | None:
    """Two short sequences in one row against each alone with the model's own attention. None when they agree."""
    native = str(model.config._attn_implementation)
    windows: set[int | None] = set()
    AttentionInterface.register(_PROOF, attention.watching(windows))
    batch = probe_batch(model)
    with _mode(model, training=False):
        alone = [states(model, body, input_ids=ids) for ids in batch.input_ids.split(batch.lengths, dim=1)]
        try:
            model.set_attn_implementation(_PROOF)
            packed = states(model, body, input_ids=batch.input_ids, **borders(batch, model.device))
        except SnugtuneError:
            raise
        except Exception as error:  # a model that breaks on packed rows is not packable, whatever the way it breaks
            return (str(error).splitlines() or [type(error).__name__])[0]
        finally:
            model.set_attn_implementation(native)
    error = _relative(packed, torch.cat(alone), per_token=moe)
    if error > _PROOF_TOLERANCE[dtype_of(model)]:
        return f"packed and separate differ by {error:.1e}"
    if _slides(model) and windows == {None}:
        return "it does not tell its attention of its sliding window"
    return None


def _slides(model: PreTrainedModel) -> bool:
    """Whether the config asks for a sliding window in any layer."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    declared = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return bool(declared) and (kinds is None or "sliding_attention" in kinds)


def _logit_shapes(config: PretrainedConfig) -> list[Logits]:
    """What the config may mean for the logits. Families differ in names, and in whether `logits_scaling` divides."""

    def numbers(*names: str) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, (int, float)) and v]

    cap = next(iter(numbers("final_logit_softcapping", "logits_soft_cap")), None)
    scaling = numbers("logits_scaling")
    scales = [1.0, *numbers("logit_scale", "lm_head_multiplier"), *scaling, *(1.0 / s for s in scaling)]
    return [Logits(scale, cap) for scale in dict.fromkeys(scales)]


def probe_batch(model: PreTrainedModel) -> Batch:
    """Two short sequences of arbitrary tokens, the second longer, so that a leak of either kind shows."""
    lengths = (11, 17)
    ids = (torch.arange(sum(lengths)) * 7919 + 13) % min(vocab_size_of(model), 1000)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(ids[None].to(model.device), positions[None].to(model.device), lengths, ())


def _relative(ours: Tensor, truth: Tensor, per_token: bool = False) -> float:
    """||ours - truth|| / ||truth|| in fp32 or better; infinite when not finite.

    `per_token`: the median over tokens. In low precision rounding sends a few tokens of an MoE to other experts.
    """
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (ours, truth))
    dim = -1 if per_token else None
    error = float(((a - b).norm(dim=dim) / b.norm(dim=dim).clamp_min(1e-30)).median())
    return error if error == error else float("inf")
