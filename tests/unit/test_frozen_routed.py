"""The two layers everything trains through: `FrozenLinear` and `RoutedLinear`. Truth: plain torch in fp64, and PEFT."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from conftest import nll_alone, relative, sequences, tiny_model
from snugtune.model.formats import Dense, Parts
from snugtune.model.frozen import FrozenLinear, freeze_linears
from snugtune.model.routed import RoutedLinear, Router, Slot
from snugtune.types import Segment

T, IN, OUT = 20, 12, 8


def _randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _frozen(dtype: torch.dtype = torch.float64, bias: bool = True) -> FrozenLinear:
    return FrozenLinear.dense(_randn(OUT, IN, dtype=dtype, seed=1), _randn(OUT, dtype=dtype, seed=2) if bias else None)


class Transient(FrozenLinear):
    """A stand-in for quantised and streamed layers: the weight is made when asked for, and somebody counts who keeps it."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(Dense(weight.dtype), {"dense": weight}, (weight.shape[0], weight.shape[1]), bias, weight.dtype)
        self.handed_out: list[weakref.ref[Tensor]] = []

    def parts(self) -> Parts:
        made = self.stored_dense.clone()
        self.handed_out.append(weakref.ref(made))
        return {"dense": made}

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.handed_out)


# ---------------------------------------------------------------- FrozenLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(T, IN), (2, 5, IN), (IN,)])
def test_a_frozen_linear_is_the_linear_it_took_over(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(IN, OUT, bias=bias).double()
    x = _randn(*shape).requires_grad_()
    direction = _randn(*shape[:-1], OUT, seed=3)
    (truth,) = torch.autograd.grad((linear(x) * direction).sum(), x)
    frozen = FrozenLinear.of(linear)
    y = frozen(x)
    (ours,) = torch.autograd.grad((y * direction).sum(), x)
    torch.testing.assert_close(y, linear(x))
    torch.testing.assert_close(ours, truth)
    assert torch.autograd.gradcheck(frozen, (x,))


def test_a_conv1d_becomes_a_transposed_view() -> None:
    conv = Conv1D(OUT, IN).double()  # weight [in, out]
    frozen = FrozenLinear.of(conv)
    x = _randn(T, IN)
    assert (frozen.in_features, frozen.out_features) == (IN, OUT)
    assert frozen.weight.shape == (OUT, IN)
    assert frozen.weight.data_ptr() == conv.weight.data_ptr()
    torch.testing.assert_close(frozen(x), conv(x))


def test_taking_over_copies_nothing_and_trains_nothing() -> None:
    linear = nn.Linear(IN, OUT)
    frozen = FrozenLinear.of(linear)
    assert frozen.weight.data_ptr() == linear.weight.data_ptr()
    assert frozen.bias is not None and frozen.bias.data_ptr() == linear.bias.data_ptr()
    assert list(frozen.parameters()) == []
    assert not frozen.weight.requires_grad and not frozen.bias.requires_grad
    assert frozen.nbytes == 4 * (IN * OUT + OUT)
    assert isinstance(frozen, nn.Linear)


def test_a_frozen_linear_moves_with_its_module() -> None:
    """The weight is a buffer: `.to()` reaches it as it reaches any module's."""
    wide = nn.Sequential(_frozen(torch.float32)).to(torch.float64)
    assert wide[0].weight.dtype == torch.float64 and wide[0].bias.dtype == torch.float64


def _routed(frozen: FrozenLinear) -> RoutedLinear:
    router = Router((Segment("a", slice(0, T), 5),))
    site = RoutedLinear(frozen, router, "site")
    site.slots["a"] = Slot(_randn(3, IN, seed=4).requires_grad_(), _randn(OUT, 3, seed=5).requires_grad_(), 0.5, 0.1)
    return site


LAYERS = [pytest.param(lambda frozen: frozen, id="frozen"), pytest.param(_routed, id="routed")]


@pytest.mark.parametrize("wrap", LAYERS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_nothing_holds_on_to_a_transient_weight(wrap: Callable[[FrozenLinear], nn.Module], recompute: bool) -> None:
    """Fetched in forward, (in recompute) and again in backward; in between it is gone."""
    frozen = Transient(_randn(OUT, IN, seed=1), None)
    layer = wrap(frozen)
    x = _randn(T, IN).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return layer(x).sin()  # sin needs the layer's output in backward: a reason to recompute it

    y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    assert isinstance(y, Tensor)
    assert len(frozen.handed_out) == 1 and frozen.alive() == 0
    y.sum().backward()
    assert len(frozen.handed_out) == (3 if recompute else 2) and frozen.alive() == 0
    assert x.grad is not None


def _held_by_graph(y: Tensor) -> list[Tensor]:
    """Tensors that the graph of y keeps as plain attributes, past autograd's own bookkeeping."""
    held, nodes = [], [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        values = list(getattr(node, "__dict__", {}).values())
        while values:
            value = values.pop()
            if isinstance(value, Tensor):
                held.append(value)
            elif isinstance(value, list | tuple):
                values.extend(value)
        nodes.extend(following for following, _ in node.next_functions if type(following).__name__ != "AccumulateGrad")
    return held


@pytest.mark.parametrize("wrap", LAYERS)
def test_no_saved_tensor_is_the_weight(wrap: Callable[[FrozenLinear], nn.Module]) -> None:
    """Also not for a dense layer, where keeping it would cost nothing and go unnoticed."""
    frozen = _frozen()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = wrap(frozen)(_randn(T, IN).requires_grad_())
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert frozen.stored_dense.untyped_storage().data_ptr() not in storages
    assert _held_by_graph(y) == []


@pytest.mark.parametrize("wrap", LAYERS)
def test_backward_uses_the_weight_it_fetches_then(wrap: Callable[[FrozenLinear], nn.Module]) -> None:
    """A streamed layer's buffer holds other bytes by the time of backward, until it is filled again."""
    frozen = _frozen()
    layer = wrap(frozen).eval()
    x, direction = _randn(T, IN).requires_grad_(), _randn(T, OUT, seed=3)
    frozen.stored_dense.mul_(2)
    (doubled,) = torch.autograd.grad((layer(x) * direction).sum(), x)
    frozen.stored_dense.div_(2)
    y = layer(x)
    frozen.stored_dense.mul_(2)  # raises in autograd's version check if the weight was saved
    (ours,) = torch.autograd.grad((y * direction).sum(), x)
    torch.testing.assert_close(ours, doubled)


@pytest.mark.parametrize("wrap", LAYERS)
def test_no_gradient_flows_when_nobody_wants_one(wrap: Callable[[FrozenLinear], nn.Module]) -> None:
    layer = wrap(_frozen())
    with torch.no_grad():
        assert layer(_randn(T, IN)).grad_fn is None
    assert _frozen()(_randn(T, IN)).grad_fn is None


class Scaled(nn.Linear):
    """A linear that computes something else: taking over its weight would be silently wrong."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Router2(nn.Linear):
    """As PhiMoE's and Llama 4's routers: a linear by class that returns a tuple."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


class Plain(nn.Linear):
    """A subclass by name alone."""


def test_only_what_computes_a_linear_is_taken() -> None:
    assert FrozenLinear.takes(nn.Linear(IN, OUT)) and FrozenLinear.takes(Conv1D(OUT, IN)) and FrozenLinear.takes(Plain(IN, OUT))
    assert not FrozenLinear.takes(Scaled(IN, OUT))
    assert not FrozenLinear.takes(_frozen())
    assert not FrozenLinear.takes(nn.Embedding(IN, OUT))
    assert not FrozenLinear.takes(Router2(IN, OUT))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_freezing_a_model_changes_no_logit_and_copies_no_weight(arch: str) -> None:
    model, native = tiny_model(arch), tiny_model(arch)
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    freeze_linears(model)
    (part,) = sequences(9)
    with torch.no_grad():
        assert torch.equal(model(input_ids=part[None]).logits, native(input_ids=part[None]).logits)
    assert not any(p.requires_grad for p in model.parameters())
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    assert len(frozen) == sum(isinstance(m, nn.Linear | Conv1D) for m in native.modules())
    assert all(m.weight.untyped_storage().data_ptr() in storages for m in frozen)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_pefts_lora_wraps_a_frozen_model(arch: str) -> None:
    """Tuners that are not ours go through PEFT: over our layers they must compute what they compute over plain ones."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    frozen_model = tiny_model(arch)
    freeze_linears(frozen_model)
    twins = []
    for model in (frozen_model, tiny_model(arch)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twins.append(peft.get_peft_model(model, copy.deepcopy(config)))
    losses = [nll_alone(twin, sequences(9, 5)) for twin in twins]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    trained = [{n: p for n, p in twin.named_parameters() if "lora_" in n} for twin in twins]
    assert len(trained[0]) == len(trained[1]) > 0
    for name, parameter in trained[0].items():
        assert parameter.grad is not None and trained[1][name].grad is not None
        assert relative(parameter.grad, trained[1][name].grad) <= 1e-5, name


# ---------------------------------------------------------------- RoutedLinear


RANKS = {"a": 3, "b": 1, "c": 7}


def _site(
    segments: tuple[Segment, ...],
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    jobs: tuple[str, ...] = ("a", "b", "c"),
) -> RoutedLinear:
    """A site with random slots; a job's factors depend on its name alone."""
    site = RoutedLinear(_frozen(dtype), Router(segments), "model.layers.0.q_proj")
    for job in jobs:
        a = _randn(RANKS[job], IN, dtype=torch.float64, seed=ord(job))
        b = _randn(OUT, RANKS[job], dtype=torch.float64, seed=ord(job) + 100)
        wide = torch.promote_types(dtype, torch.float32)
        site.slots[job] = Slot(a.to(wide).requires_grad_(), b.to(wide).requires_grad_(), 0.5 + ord(job) / 100, dropout)
    return site


# Chunks of three jobs, b twice, with rows 6:8 and 18:20 that belong to nobody.
SEGMENTS = (
    Segment("a", slice(0, 6), 11),
    Segment("b", slice(8, 9), 12),
    Segment("c", slice(9, 14), 13),
    Segment("b", slice(14, 18), 14),
)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("segments", [(Segment("a", slice(None), 3),), SEGMENTS], ids=["alone", "shared"])
def test_gradcheck(segments: tuple[Segment, ...], dropout: float) -> None:
    """Numerical differentiation in fp64 with respect to x and every factor, through the same dropout masks."""
    site = _site(segments, dropout=dropout)
    jobs = sorted({s.job for s in segments})
    factors = [f for job in jobs for f in (site.slots[job].a, site.slots[job].b)]

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        for i, job in enumerate(jobs):
            site.slots[job] = Slot(factors[2 * i], factors[2 * i + 1], site.slots[job].scale, dropout)
        return site(x)

    assert torch.autograd.gradcheck(function, (_randn(T, IN).requires_grad_(), *factors))


def _run(site: RoutedLinear, x: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor | None, Tensor | None]]]:
    """Output, dx and factor gradients under a fixed upstream gradient that depends on the row alone."""
    x = x.clone().requires_grad_()
    y = site(x)
    (y * torch.cos(torch.arange(OUT, dtype=x.dtype) + x.detach()[..., :1].nan_to_num())).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {job: (slot.a.grad, slot.b.grad) for job, slot in site.slots.items()}


def test_a_shared_row_is_the_textbook_formula_for_each_of_its_rows() -> None:
    """y = x W^T + b + s x A^T B^T with each row's own A, B and s; rows of nobody see the frozen layer alone."""
    x, site = _randn(T, IN), _site(SEGMENTS)
    owner = {i: s.job for s in SEGMENTS for i in range(T)[s.tokens]}
    y = site(x)
    for i in range(T):
        truth = F.linear(x[i], site.frozen.weight, site.frozen.bias)
        if i in owner:
            slot = site.slots[owner[i]]
            truth = truth + slot.scale * (slot.b @ (slot.a @ x[i]))
        torch.testing.assert_close(y[i], truth)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_job_is_as_if_it_were_alone(dropout: float, training: bool) -> None:
    """Every job beside two others of other ranks, against the job by itself; dropout follows the chunk wherever it stands.

    The factors' gradients come from slices of one shape, so their bits agree; y and dx come from GEMMs of other heights.
    """
    x, site = _randn(T, IN), _site(SEGMENTS, dropout=dropout).train(training)
    y, dx, grads = _run(site, x)
    for job in "abc":
        mine = tuple(s for s in SEGMENTS if s.job == job)
        rows = torch.cat([torch.arange(T)[s.tokens] for s in mine])
        ends = torch.tensor([0, *(s.tokens.stop - s.tokens.start for s in mine)]).cumsum(0).tolist()
        moved = tuple(Segment(job, slice(ends[i], ends[i + 1]), s.seed) for i, s in enumerate(mine))
        alone = _site(moved, dropout=dropout, jobs=job).train(training)
        y_alone, dx_alone, grads_alone = _run(alone, x[rows])
        torch.testing.assert_close(y[rows], y_alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dx[rows], dx_alone, rtol=1e-12, atol=1e-12)
        for together, by_itself in zip(grads[job], grads_alone[job], strict=True):
            assert together is not None and by_itself is not None
            assert torch.equal(together, by_itself)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("where", ["rows", "a", "b"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_job_that_goes_nan_leaves_its_neighbours_alone(where: str, poison: float, dropout: float) -> None:
    """In its rows or in its factors; every number of the others, and of nobody's rows, is bit-equal to a clean run."""
    x, site = _randn(T, IN), _site(SEGMENTS, dropout=dropout)
    y, dx, grads = _run(site, x)
    sick_x, sick = x.clone(), _site(SEGMENTS, dropout=dropout)
    if where == "rows":
        sick_x[8:9] = poison
        sick_x[14:18] = poison
    else:
        getattr(sick.slots["b"], where).data.fill_(poison)
    sick_y, sick_dx, sick_grads = _run(sick, sick_x)
    healthy = torch.tensor([i for i in range(T) if not (i == 8 or 14 <= i < 18)])
    assert torch.equal(sick_y[healthy], y[healthy])
    assert torch.equal(sick_dx[healthy], dx[healthy])
    assert not torch.isfinite(sick_y[8:9]).any()
    for job in "ac":
        for clean, beside in zip(grads[job], sick_grads[job], strict=True):
            assert clean is not None and beside is not None and torch.equal(clean, beside)


def test_a_job_without_rows_or_slot_is_left_out() -> None:
    """Jobs adapt different sites: a segment whose job has no slot here sees the frozen layer, and costs no gradient."""
    x, site = _randn(T, IN), _site(SEGMENTS, jobs="ac")
    site.slots["idle"] = Slot(_randn(2, IN).requires_grad_(), _randn(OUT, 2).requires_grad_(), 1.0)
    y, _, grads = _run(site, x)
    torch.testing.assert_close(y[14:18], site.frozen(x[14:18]))
    assert grads["idle"] == (None, None)


def test_without_routing_a_site_is_its_frozen_layer() -> None:
    x, site = _randn(T, IN), _site(())
    assert torch.equal(site(x), site.frozen(x))


def test_leading_dimensions_are_rows_too() -> None:
    """transformers hands [1, T, D]."""
    x, site = _randn(T, IN), _site(SEGMENTS)
    assert torch.equal(site(x[None])[0], site(x))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bf16_saves_x_once_as_it_is_and_nothing_else(dropout: float) -> None:
    """An fp32 copy of x for the fp32 factors, x A^T per job, or a mask would each grow with the tokens."""
    site = _site(SEGMENTS, torch.bfloat16, dropout)
    x = _randn(T, IN, dtype=torch.bfloat16).requires_grad_()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = site(x)
    assert [(t.dtype, t.data_ptr(), t.shape) for t in saved] == [(torch.bfloat16, x.data_ptr(), x.shape)]
    assert _held_by_graph(y) == [] and y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for s in site.slots.values() for f in (s.a, s.b))


def test_the_frozen_weight_has_no_gradient_and_no_parameter() -> None:
    site = _site(SEGMENTS)
    _run(site, _randn(T, IN))
    assert list(site.parameters()) == []
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in site.buffers())


def test_the_first_layer_needs_no_dx() -> None:
    """x without gradient (the embedding of a frozen base): the factors still get theirs."""
    with_dx, without = _site(SEGMENTS), _site(SEGMENTS)
    _run(with_dx, _randn(T, IN))
    x = _randn(T, IN)
    (without(x) * torch.cos(torch.arange(OUT, dtype=x.dtype) + x[..., :1])).sum().backward()
    for job in "abc":
        assert without.slots[job].a.grad is not None
        assert torch.equal(without.slots[job].a.grad, with_dx.slots[job].a.grad)


@pytest.mark.parametrize("job", ["a", "b", "c"])
def test_it_is_pefts_lora(job: str) -> None:
    """One job over the whole row against PEFT's layer with the same factors: output, dx, dA, dB in fp64."""
    site = _site((Segment(job, slice(None), 0),), jobs=job)
    slot, x = site.slots[job], _randn(T, IN)
    linear = nn.Linear(IN, OUT).double()
    linear.weight.data, linear.bias.data = site.frozen.weight.clone(), site.frozen.bias.clone()
    config = peft.LoraConfig(r=RANKS[job], lora_alpha=slot.scale * RANKS[job])
    layer = peft.tuners.lora.layer.Linear(linear, "default", config, r=RANKS[job], lora_alpha=slot.scale * RANKS[job]).double()
    layer.lora_A["default"].weight.data = slot.a.detach().clone()
    layer.lora_B["default"].weight.data = slot.b.detach().clone()
    truth_x = x.clone().requires_grad_()
    truth = layer(truth_x)
    (truth * torch.cos(torch.arange(OUT, dtype=x.dtype) + x[..., :1])).sum().backward()
    y, dx, grads = _run(site, x)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(dx, truth_x.grad)
    torch.testing.assert_close(grads[job][0], layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(grads[job][1], layer.lora_B["default"].weight.grad)


def test_bf16_is_no_worse_than_plain_bf16_lora() -> None:
    """Error against fp64 on the same rounded inputs, next to that of autograd over the same formula in bf16."""
    n, rank = 64, 8
    weight, a, b = _randn(n, n, seed=1) / 8, _randn(rank, n, seed=2) / 8, _randn(n, rank, seed=3)
    x, direction = _randn(256, n), _randn(256, n, seed=4)
    weight, x, direction = (t.bfloat16() for t in (weight, x, direction))

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_(), a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()]
        y = leaves[0] @ weight.to(dtype).t() + 0.5 * ((leaves[0] @ leaves[1].t()) @ leaves[2].t())
        return [y.detach(), *torch.autograd.grad((y * direction.to(dtype)).sum(), leaves)]

    site = RoutedLinear(FrozenLinear.dense(weight), Router((Segment("j", slice(None), 0),)), "s")
    site.slots["j"] = Slot(a.float().requires_grad_(), b.float().requires_grad_(), 0.5)
    mine = x.clone().requires_grad_()
    y = site(mine)
    (y * direction).sum().backward()
    ours = [y.detach(), mine.grad, site.slots["j"].a.grad, site.slots["j"].b.grad]
    truth, rounded = plain(torch.float64), plain(torch.bfloat16)
    for name, exact, theirs, own in zip(("y", "dx", "dA", "dB"), truth, rounded, ours, strict=True):
        assert own is not None
        assert relative(own, exact) <= 1.1 * relative(theirs, exact), name


# ---------------------------------------------------------------- dropout


def _mask_of(
    p: float, seed: int, name: str = "site", start: int = 0, rows: int = 64, width: int = 128, train: bool = True
) -> Tensor:
    """What LoRA's branch sees of an input of ones: W = 0 and A = B = 1 lay dropout bare."""
    frozen = FrozenLinear.dense(torch.zeros(width, width))
    router = Router((Segment("j", slice(start, start + rows), seed),))
    site = RoutedLinear(frozen, router, name).train(train)
    site.slots["j"] = Slot(torch.eye(width), torch.eye(width), 1.0, p)
    with torch.no_grad():
        return site(torch.ones(start + rows, width))[start:]


def test_the_mask_is_a_function_of_seed_and_site_alone() -> None:
    """Not of the global generator, not of where the chunk stands in the row."""
    mask = _mask_of(0.3, seed=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert torch.equal(_mask_of(0.3, seed=7), mask)
    assert torch.equal(_mask_of(0.3, seed=7, start=5), mask)
    assert not torch.equal(_mask_of(0.3, seed=8), mask)
    assert not torch.equal(_mask_of(0.3, seed=7, name="other"), mask)


def test_drawing_a_mask_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    _mask_of(0.3, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_p_is_respected(p: float) -> None:
    """Kept values are scaled by 1 / (1 - p); the share of dropped ones is within four standard deviations of p."""
    masks = torch.cat([_mask_of(p, seed) for seed in range(4)])
    kept = masks[masks != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    share, deviation = float((masks == 0).float().mean()), (p * (1 - p) / masks.numel()) ** 0.5
    assert abs(share - p) < 4 * deviation


def test_masks_of_different_chunks_and_sites_are_independent() -> None:
    """Two masks at p = 0.5 agree on half of their places, also for neighbouring seeds."""
    masks = [_mask_of(0.5, 7) != 0, _mask_of(0.5, 8) != 0, _mask_of(0.5, 7, name="other") != 0]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert abs(float((one == other).float().mean()) - 0.5) < 4 * 0.5 / one.numel() ** 0.5


def test_there_is_no_dropout_outside_of_training() -> None:
    assert torch.equal(_mask_of(0.5, seed=7, train=False), torch.ones(64, 128))
    assert torch.equal(_mask_of(0.0, seed=7), torch.ones(64, 128))


def test_recompute_draws_the_same_masks() -> None:
    """Checkpointed without saving the generator's state, as the trainer does."""
    x, kept, recomputed = _randn(T, IN), _site(SEGMENTS, dropout=0.4), _site(SEGMENTS, dropout=0.4)
    y, dx, grads = _run(kept, x)
    again = recomputed.forward
    recomputed.forward = lambda x: checkpoint(again, x, use_reentrant=False, preserve_rng_state=False)
    y2, dx2, grads2 = _run(recomputed, x)
    assert torch.equal(y, y2) and torch.equal(dx, dx2)
    for job in "abc":
        assert all(torch.equal(one, two) for one, two in zip(grads[job], grads2[job], strict=True))


# ---------------------------------------------------------------- routing


def test_routing_ends_with_its_block_also_when_it_fails() -> None:
    router, one, two = Router(), (Segment("a", slice(0, 3), 0),), (Segment("b", slice(0, 3), 0),)
    with router.routing(one):
        with pytest.raises(RuntimeError, match="broken"), router.routing(two):
            assert router.segments == two
            raise RuntimeError("broken")
        assert router.segments == one
    assert router.segments == ()


def test_backward_outside_of_recompute_does_not_ask_the_router() -> None:
    """A batch's routing is remembered by its graph: only recompute needs the block to span backward."""
    x, site = _randn(T, IN), _site(SEGMENTS)
    _, dx, _ = _run(site, x)
    other = _site(SEGMENTS)
    leaf = x.clone().requires_grad_()
    y = (other(leaf) * torch.cos(torch.arange(OUT, dtype=x.dtype) + x[..., :1])).sum()
    with other.router.routing((Segment("a", slice(None), 0),)):
        y.backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, dx)
