"""The head: losses without all the logits. Truth: torch's cross entropy over full logits in fp64, transformers, PEFT."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from conftest import (
    VOCAB,
    lora_gradients,
    nll_alone,
    nll_packed,
    packed,
    peft_twin,
    relative,
    sequences,
    shake,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
)
from snugtune.methods.full import Full, FullConfig
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.model.base import Base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.head import Head, Logits
from snugtune.model.pieces import PIECE
from snugtune.model.routed import RoutedLinear, Router, Slot
from snugtune.types import Segment

N, D, V = 23, 16, 50


WIDE = 3 * PIECE // D + 5
"""A vocabulary whose weight comes in pieces."""


@dataclass(frozen=True)
class Case:
    """Scored rows and a head's weights, in fp64."""

    h: Tensor
    targets: Tensor
    weights: Tensor
    weight: Tensor
    bias: Tensor | None

    def truth(self, scale: float, cap: float | None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Loss and dh from full logits by autograd, computed in `dtype` as the models do."""
        h = self.h.to(dtype).clone().requires_grad_()
        z = F.linear(h, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)) * scale
        if cap is not None:
            z = torch.tanh(z / cap) * cap
        each = F.cross_entropy(z.to(torch.promote_types(dtype, torch.float32)), self.targets, reduction="none")
        loss = (each * self.weights.to(each.dtype)).sum()
        loss.backward()
        assert h.grad is not None
        return loss.detach(), h.grad


def _case(bias: bool = False, n: int = N, dtype: torch.dtype = torch.float64) -> Case:
    """Values that `dtype` can hold, so that every dtype computes with the same numbers."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()  # noqa: E731
    targets = torch.randint(0, V, (n,), generator=generator)
    weights = torch.rand(n, generator=generator) * (torch.arange(n) % 4 != 1)  # some rows weigh nothing
    return Case(draw(n, D), targets, weights, draw(V, D), draw(V) if bias else None)


def _frozen_head(case: Case, scale: float, cap: float | None, dtype: torch.dtype = torch.float64, rows: int = 512) -> Head:
    layer = FrozenLinear.dense(case.weight.to(dtype), None if case.bias is None else case.bias.to(dtype))
    return Head(layer, Logits(scale, cap), rows)


def _by_logprobs(head: Head, h: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return -(head.logprobs(h, targets) * weights).sum()


SHAPES = pytest.mark.parametrize(
    ("scale", "cap", "bias"),
    [(1.0, None, False), (1.0, 4.0, False), (0.3, None, False), (1 / 3, None, True), (1.0, None, True), (0.5, 3.0, True)],
    ids=["plain", "softcap", "scale", "scale-bias", "bias", "all"],
)
ROADS = pytest.mark.parametrize("road", [Head.nll, _by_logprobs], ids=["frozen", "generic"])


@ROADS
@SHAPES
@pytest.mark.parametrize("rows", [1, 7, 23, 512])
def test_sum_and_gradient_are_cross_entropys(scale: float, cap: float | None, bias: bool, road: Any, rows: int) -> None:
    """On both roads and for any number of rows of logits at once, in fp64."""
    case = _case(bias)
    expected, dh = case.truth(scale, cap)
    head = _frozen_head(case, scale, cap, rows=rows)
    h = case.h.clone().requires_grad_()
    loss = road(head, h, case.targets, case.weights)
    (loss * 3).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h.grad, 3 * dh, rtol=1e-12, atol=1e-12)


@ROADS
@SHAPES
def test_gradcheck(scale: float, cap: float | None, bias: bool, road: Any) -> None:
    case = _case(bias, n=5)
    head = _frozen_head(case, scale, cap, rows=2)
    assert torch.autograd.gradcheck(lambda h: road(head, h, case.targets, case.weights), (case.h.clone().requires_grad_(),))


@pytest.mark.parametrize("rows", [7, 512])
@pytest.mark.parametrize("frozen", [True, False])
@SHAPES
def test_label_smoothing_is_cross_entropys(scale: float, cap: float | None, bias: bool, frozen: bool, rows: int) -> None:
    case = _case(bias)
    h = case.h.clone().requires_grad_()
    z = F.linear(h, case.weight, case.bias) * scale
    z = z if cap is None else torch.tanh(z / cap) * cap
    truth = (F.cross_entropy(z, case.targets, reduction="none", label_smoothing=0.3) * case.weights.double()).sum()
    (truth_grad,) = torch.autograd.grad(truth, h)
    head = _frozen_head(case, scale, cap, rows=rows)
    if not frozen:
        linear = nn.Linear(D, V, bias=bias, dtype=torch.float64).requires_grad_(False)
        linear.weight.copy_(case.weight)
        if bias:
            linear.bias.copy_(case.bias)
        head = Head(linear, Logits(scale, cap), rows)
    ours = head.nll(h, case.targets, case.weights.double(), 0.3)
    (grad,) = torch.autograd.grad(ours, h)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-9, atol=1e-12)


@SHAPES
def test_logprobs_are_log_softmax_at_the_targets(scale: float, cap: float | None, bias: bool) -> None:
    case = _case(bias)
    head = _frozen_head(case, scale, cap, rows=7)
    z = F.linear(case.h, case.weight, case.bias) * scale
    z = z if cap is None else torch.tanh(z / cap) * cap
    torch.testing.assert_close(head.logits(case.h), z)
    torch.testing.assert_close(head.logprobs(case.h, case.targets), z.log_softmax(-1).gather(1, case.targets[:, None])[:, 0])


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_loss_is_fp32_whatever_the_model(scale: float, cap: float | None, bias: bool, dtype: torch.dtype) -> None:
    """bf16 losses have three digits: no curve could be drawn from them."""
    case = _case(bias, dtype=dtype)
    expected, _ = case.truth(scale, cap, dtype)
    head = _frozen_head(case, scale, cap, dtype, rows=7)
    for road in (Head.nll, _by_logprobs):
        loss = road(head, case.h.to(dtype).requires_grad_(), case.targets, case.weights.float())
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)


@ROADS
@SHAPES
@pytest.mark.parametrize("divisor", [1.0, 37.0])
def test_bf16_gradients_are_as_good_as_plain_bf16s(
    scale: float, cap: float | None, bias: bool, road: Any, divisor: float
) -> None:
    """Error against fp64, next to that of autograd over full bf16 logits upcast for the loss, as transformers does it."""
    case = _case(bias, n=400, dtype=torch.bfloat16)
    _, exact = case.truth(scale, cap)
    _, plain = case.truth(scale, cap, torch.bfloat16)
    h = case.h.bfloat16().requires_grad_()
    loss = road(_frozen_head(case, scale, cap, torch.bfloat16, rows=64), h, case.targets, case.weights.float())
    (loss / divisor).backward()
    assert h.grad is not None and h.grad.dtype == torch.bfloat16
    assert relative(h.grad.double() * divisor, exact) <= 1.15 * relative(plain, exact)


@ROADS
def test_a_kept_graph_gives_the_same_gradient_twice(road: Any) -> None:
    """Whoever keeps the graph (several losses over one forward) must not get a silent zero the second time."""
    case = _case()
    h = case.h.clone().requires_grad_()
    loss = road(_frozen_head(case, 1.0, None, rows=7), h, case.targets, case.weights)
    first, second = (torch.autograd.grad(loss, h, retain_graph=True, allow_unused=True)[0] for _ in range(2))
    assert second is not None and torch.equal(first, second)


@ROADS
def test_no_rows_is_no_loss(road: Any) -> None:
    """A chunk whose every label was cut away."""
    case = _case(n=0)
    h = case.h.clone().requires_grad_()
    loss = road(_frozen_head(case, 1.0, None), h, case.targets, case.weights)
    loss.backward()
    assert loss.item() == 0.0 and h.grad is not None and h.grad.shape == (0, D)


def test_rows_at_once_bounds_the_logits() -> None:
    """No tensor of more than rows_at_once x V is ever made by either road, forward or backward; ours are about equal."""
    case, limit = _case(n=50), 20
    head = _frozen_head(case, 1.0, 4.0, rows=limit)
    weight = case.weight.untyped_storage().data_ptr()

    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[1:] == (V,) and out.untyped_storage().data_ptr() != weight:
                Widest.rows = max(Widest.rows, out.shape[0])
            return out

    for road, widest in ((Head.nll, 17), (_by_logprobs, limit)):
        Widest.rows = 0
        with Widest():
            road(head, case.h.clone().requires_grad_(), case.targets, case.weights).backward()
        assert Widest.rows == widest


@SHAPES
@pytest.mark.parametrize("rows", [4, 512])
def test_a_training_head_gets_its_gradients(scale: float, cap: float | None, bias: bool, rows: int) -> None:
    """dW and db of a head that trains, and dh through it, from chunks that are recomputed."""
    case = _case(bias)
    leaves = [t.clone().requires_grad_() for t in (case.h, case.weight, *(() if case.bias is None else (case.bias,)))]
    z = F.linear(leaves[0], leaves[1], leaves[2] if bias else None) * scale
    z = z if cap is None else torch.tanh(z / cap) * cap
    (F.cross_entropy(z, case.targets, reduction="none") * case.weights).sum().backward()

    linear = nn.Linear(D, V, bias=bias).double()
    linear.weight.data = case.weight.clone()
    if case.bias is not None:
        linear.bias.data = case.bias.clone()
    h = case.h.clone().requires_grad_()
    Head(linear, Logits(scale, cap), rows).nll(h, case.targets, case.weights).backward()
    torch.testing.assert_close(h.grad, leaves[0].grad)
    torch.testing.assert_close(linear.weight.grad, leaves[1].grad)
    if bias:
        torch.testing.assert_close(linear.bias.grad, leaves[2].grad)


def test_a_frozen_head_gives_the_hidden_states_gradient_even_if_weights_move() -> None:
    """dh is made in forward: what happens to the weight afterwards (streaming) does not matter."""
    case = _case()
    _, dh = case.truth(1.0, None)
    head = _frozen_head(case, 1.0, None)
    h = case.h.clone().requires_grad_()
    loss = head.nll(h, case.targets, case.weights)
    assert isinstance(head.project, FrozenLinear)
    head.project.stored_dense.zero_()
    loss.backward()
    torch.testing.assert_close(h.grad, dh)


# ---------------------------------------------------------------- the heads of real architectures


HEADS = ("llama", "gemma2", "cohere", "granite", "phi", "gpt2", "recurrent_gemma", "falcon_h1", "hyperclovax")


def _rows(base: Base, parts: list[Tensor]) -> list[list[Tensor]]:
    """All in one row, or each in its own where they cannot share one."""
    return [parts] if base.packable else [[part] for part in parts]


@pytest.mark.parametrize("freeze", [False, True], ids=["generic", "frozen"])
@pytest.mark.parametrize("arch", HEADS)
def test_a_bases_loss_is_the_models_own(arch: str, freeze: bool) -> None:
    """Scale, cap and bias are found from the config; the truth is the untouched model."""
    base, native, parts = tiny_base(arch), tiny_model(arch), sequences(11, 2, 9)
    if freeze:
        base.freeze()
    base.configure(recompute=False, head_rows=4)
    assert not base.own_head
    with torch.no_grad():
        ours = sum(nll_packed(base, row) for row in _rows(base, parts))
        torch.testing.assert_close(ours, nll_alone(native, parts), rtol=1e-6, atol=0)


def test_the_architectures_shapes_are_what_they_are_for() -> None:
    """If transformers renamed an option, the cases above would test plain heads only."""
    shapes = {arch: tiny_base(arch).head.shape for arch in HEADS}
    assert shapes["llama"] == shapes["phi"] == shapes["gpt2"] == Logits()
    assert shapes["gemma2"] == Logits(softcap=4.0)
    assert shapes["cohere"] == Logits(scale=0.3)
    assert shapes["granite"] == Logits(scale=1 / 3)
    assert shapes["recurrent_gemma"] == Logits(softcap=4.0)
    assert shapes["falcon_h1"] == Logits(scale=0.3)
    assert shapes["hyperclovax"] == Logits(scale=3.0)  # it multiplies by what Granite divides by
    assert tiny_base("mpt", logit_scale="inv_sqrt_d_model").head.shape == Logits()  # no number, and the model ignores it
    assert tiny_model("phi").get_output_embeddings().bias is not None


@pytest.mark.parametrize("arch", HEADS)
def test_a_full_models_head_trains(arch: str) -> None:
    """Also a tied one, whose gradient joins that of the input embeddings."""
    base, native, parts = tiny_base(arch), tiny_model(arch), sequences(11, 2, 9)
    Full().attach(base, "j", FullConfig(), 0)
    base.configure(recompute=False, head_rows=4)
    for row in _rows(base, parts):
        nll_packed(base, row).backward()
    nll_alone(native, parts).backward()
    ours, truth = base.model.get_output_embeddings(), native.get_output_embeddings()
    assert relative(ours.weight.grad, truth.weight.grad) <= 2e-5
    if arch == "phi":
        assert relative(ours.bias.grad, truth.bias.grad) <= 2e-5


# ---------------------------------------------------------------- adapters on the head


@pytest.mark.parametrize("head_rows", [3, 512])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2"])
def test_lora_on_the_head_is_honoured(arch: str, head_rows: int) -> None:
    """Against PEFT with the head among its targets: loss and all gradients, also where it is tied or capped."""
    base, parts = tiny_base(arch), sequences(11, 2, 9)
    inner = "c_attn" if arch == "gpt2" else "q_proj"
    attached = Lora().attach(base, "j", LoraConfig(r=3, target_modules=(inner, "lm_head")), 0)
    shake(attached)
    base.configure(recompute=False, head_rows=head_rows)
    base.model.train()
    assert "lm_head" in base.sites and isinstance(base.head.project, RoutedLinear)
    with base.routed(packed(parts, "j")):
        loss = nll_packed(base, parts, "j")
        loss.backward()
    twin = peft_twin(tiny_model(arch), attached)
    truth = nll_alone(twin, parts)
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)
    for name, gradient in lora_gradients(attached).items():
        expected = twin.get_parameter(name).grad
        assert expected is not None and relative(gradient, expected) <= 2e-5, name


def test_the_head_knows_whose_rows_it_scores() -> None:
    """Two jobs adapt the head; each chunk's loss comes from its own job's factors, a third one's from the bare head."""
    base = tiny_base("llama")
    for seed, job in enumerate("ab"):
        shake(Lora().attach(base, job, LoraConfig(r=2, target_modules=("lm_head",)), 0), seed)
    h, targets, weights = torch.randn(6, 64), torch.arange(6), torch.ones(6)
    losses = {job: base.head.for_segment(Segment(job, slice(100, 106), 0)).nll(h, targets, weights) for job in "abc"}
    site = base.sites["lm_head"]
    for job, loss in losses.items():
        z = F.linear(h, site.frozen.weight)
        if job in site.slots:
            slot = site.slots[job]
            z = z + slot.scale * h @ slot.a.t() @ slot.b.t()
        torch.testing.assert_close(loss, F.cross_entropy(z, targets, reduction="sum"))


def test_dropout_on_the_head_differs_between_its_chunks_of_rows() -> None:
    """One mask for every rows_at_once rows would be no dropout over the rows at all; recompute draws the same again."""
    layer = FrozenLinear.dense(torch.zeros(V, D, dtype=torch.float64))
    segment = Segment("j", slice(0, 8), 5)
    site = RoutedLinear(layer, Router(), "lm_head")
    a, b = torch.randn(4, D).double().requires_grad_(), torch.randn(V, 4).double().requires_grad_()
    site.slots["j"] = Slot(a, b, 1.0, 0.5)
    head = Head(site, Logits(), rows_at_once=4, router=site.router).for_segment(segment)
    h, targets = torch.ones(1, D, dtype=torch.float64).expand(8, D), torch.zeros(8, dtype=torch.long)
    first, second = head.logprobs(h, targets).split(4)
    assert not torch.equal(first, second)
    assert torch.autograd.gradcheck(lambda a, b: _with_factors(site, a, b, head, h, targets), (a, b))


def _with_factors(site: RoutedLinear, a: Tensor, b: Tensor, head: Head, h: Tensor, targets: Tensor) -> Tensor:
    site.slots["j"] = Slot(a, b, 1.0, 0.5)
    return head.logprobs(h, targets)


# ---------------------------------------------------------------- heads that are more than a projection


class Odd(LlamaForCausalLM):
    """A model whose logits are no function of its output embeddings alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5 + torch.linspace(-1, 1, VOCAB)
        return out


def _odd_model() -> Odd:
    plain = tiny_model("llama")
    odd = Odd(plain.config)
    odd.load_state_dict(plain.state_dict())
    return odd.eval()


def _transforming_model() -> Any:
    """Dense, activation and norm stand between the body and the output embeddings."""
    return tiny_model("modernbert")


def test_a_scale_that_the_model_ignores_is_ignored() -> None:
    """Its config says logit_scale; a Llama does not look at it, and what it computes counts."""
    base = Base(tiny_model("llama", logit_scale=0.3), tiny_tokenizer(), "misnamed")
    assert not base.own_head and base.head.shape == Logits()


ODD = pytest.mark.parametrize("make", [_odd_model, _transforming_model], ids=["odd", "transforming"])


@ODD
def test_a_head_that_does_not_reproduce_is_found_and_said_aloud(make: Any) -> None:
    base = Base(make(), tiny_tokenizer(), "odd")
    assert base.own_head and base.packable
    assert len(base.notes) == 1 and "own, unchunked" in base.notes[0]


@ODD
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_such_a_model_trains_as_with_peft(make: Any, recompute: bool) -> None:
    """Through its own forward: loss and LoRA gradients of a packed row, the head among the targets."""
    base, parts = Base(make(), tiny_tokenizer(), "odd"), sequences(11, 2, 9)
    inner, head = (
        (("q_proj", "mlp.Wo", "dense"), "decoder") if make is _transforming_model else (("q_proj", "down_proj"), "lm_head")
    )
    attached = Lora().attach(base, "j", LoraConfig(r=3, target_modules=(*inner, head)), 0)
    shake(attached)
    base.configure(recompute=recompute, head_rows=4)
    base.model.train()
    with base.routed(packed(parts, "j")):
        loss = nll_packed(base, parts, "j")
        loss.backward()
    twin = peft_twin(make(), attached)
    truth = nll_alone(twin, parts)
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)
    for name, gradient in lora_gradients(attached).items():
        expected = twin.get_parameter(name).grad
        assert expected is not None and relative(gradient, expected) <= 2e-5, name


@ODD
def test_such_a_model_trains_in_full(make: Any) -> None:
    base, native, parts = Base(make(), tiny_tokenizer(), "odd"), make(), sequences(11, 2, 9)
    Full().attach(base, "j", FullConfig(), 0)
    base.configure(recompute=False, head_rows=4)
    nll_packed(base, parts).backward()
    nll_alone(native, parts).backward()
    for (name, ours), truth in zip(base.model.named_parameters(), native.parameters(), strict=True):
        assert ours.grad is not None and truth.grad is not None and relative(ours.grad, truth.grad) <= 2e-5, name


def test_a_head_that_breaks_on_hidden_states_falls_back_too() -> None:
    """BERT-like heads transform before they project: the shapes need not even fit."""
    model = tiny_model("llama")
    lm_head = model.get_output_embeddings()
    transform = nn.Linear(64, 32)
    model.lm_head = nn.Sequential(transform, nn.Linear(32, VOCAB))
    model.get_output_embeddings = lambda: model.lm_head[1]
    base = Base(model, tiny_tokenizer(), "transforming")
    assert lm_head is not None and base.own_head


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_heads_gradients_in_pieces_are_autograds(dtype: torch.dtype, bias: bool) -> None:
    """A few rows of the weight's gradient at a time: each number is the same sum."""
    torch.manual_seed(0)
    linear = nn.Linear(D, WIDE, bias, dtype=dtype)
    h, dz = torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randn(N, WIDE, dtype=dtype)
    inputs = (h, *linear.parameters())
    z, truth = Head(linear, Logits()).logits(h), linear(h)
    assert torch.equal(z, truth.float())
    ours, theirs = (torch.autograd.grad(out, inputs, dz.to(out.dtype)) for out in (z, truth))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01 if dtype == torch.bfloat16 else 0.002, atol=0)


def test_what_a_narrow_heads_gradient_takes_is_as_large_as_a_piece() -> None:
    """No product gives more than a piece: torch may sum it up in fp32, out of sight, beside what it gives."""
    linear = nn.Linear(D, WIDE, bias=False, dtype=torch.bfloat16)
    z = Head(linear, Logits()).logits(torch.randn(N, D, dtype=torch.bfloat16))
    with Products() as products:
        z.backward(torch.randn(N, WIDE))
    assert linear.weight.grad is not None and 0 < products.largest <= PIECE < linear.weight.numel()


class Products(TorchDispatchMode):
    """Notes the numbers of the largest result of a matrix product."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.largest = max(self.largest, made.numel())
        return made
