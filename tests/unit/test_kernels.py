"""Which kernels are chosen, and the layers that use them. No GPU is needed: Liger's are stand-ins, torch's run on CPU, too."""

import ast
import inspect
from collections.abc import Callable, Iterator
from importlib import metadata, util
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from liger_for_tests import STAND_INS, LigerRMSNormFunction, LigerSiLUMulFunction, stand_in
from torch import Tensor, nn

from conftest import lora_gradients, nll_packed, packed, relative, sequences, shake, tiny_base
from joint import JOBS, STEPS, alone, together, unlike
from quantised import plan_of
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.model import grouped, kernels, liger
from snugtune.model.base import Base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.gated import GatedMLP
from snugtune.model.kernels import UNMEASURED, Kernels, Setting, choose
from snugtune.model.norms import LeanNorm, take_kernel
from snugtune.model.routed import RoutedLinear, Router, Slot
from snugtune.types import Segment

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOPPER = Setting("cuda", BF16, (9, 0), kernels.LIGER)

# --- the choice -------------------------------------------------------------------------------------------------------

LIGER, FLASH, GROUPED = {"norms": "liger", "gated_layers": "liger"}, {"attention": "flash"}, {"adapters": "grouped"}
CHOICES = [
    (Setting("cpu", BF16), {}),
    (Setting("cpu", FP32, None, kernels.LIGER), {}),
    (Setting("mps", FP16, None, kernels.LIGER), {}),
    (HOPPER, LIGER | FLASH | GROUPED),
    (Setting("cuda", BF16, (10, 0), None), FLASH | GROUPED),
    (Setting("cuda", BF16, (8, 9), kernels.LIGER), LIGER | FLASH),  # there torch takes grouped products in a loop
    (Setting("cuda", BF16, (12, 0), kernels.LIGER), LIGER | FLASH),
    (Setting("cuda", FP16, (9, 0), kernels.LIGER), LIGER | FLASH),
    (Setting("cuda", FP32, (9, 0), kernels.LIGER), LIGER),
    (Setting("cuda", FP64, (9, 0), kernels.LIGER), {}),
    (Setting("cuda", BF16, (7, 5), kernels.LIGER), LIGER),
    (Setting("cuda", BF16, (8, 0), "0.8.4"), FLASH),
]


@pytest.mark.parametrize(("setting", "chosen"), CHOICES, ids=str)
def test_the_choice(setting: Setting, chosen: dict[str, Any]) -> None:
    assert choose(setting) == Kernels(**chosen)
    said = kernels.described(setting)
    assert all((UNMEASURED in line) == (setting.device == "cuda") for line in said.values())
    assert {part for part, line in said.items() if not line.startswith("snugtune's own")} == chosen.keys()


def test_what_is_missing_is_said() -> None:
    said = kernels.described(Setting("cuda", FP32, (7, 5)))
    assert "pip install 'snugtune[cuda]'" in said["norms"] and "Triton" in said["norms"]
    assert "0.8.4" in kernels.described(Setting("cuda", FP32, (7, 5), "0.8.4"))["gated_layers"]
    assert "capability 9 or 10" in said["adapters"] and "8.0" in said["attention"]


@pytest.mark.parametrize("missing", ["liger_kernel", "triton", None])
def test_liger_counts_only_with_triton(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else SimpleNamespace())
    monkeypatch.setattr(metadata, "version", lambda name: {"liger-kernel": "0.8.5"}[name])
    assert kernels.liger_version() == (None if missing else "0.8.5")


def test_on_cpu_everything_is_our_own() -> None:
    base = tiny_base("llama")
    Lora().attach(base, "j", LoraConfig(r=3), 0)
    assert base.kernel_notes == () and not base.groups
    assert all(module.kernel is None for module in base.model.modules() if isinstance(module, LeanNorm | GatedMLP))
    assert {site.products.__name__ for site in base.sites.values()} == {"Apart"}
    assert choose(kernels.setting_of(base.device, base.dtype)) == Kernels()


# --- Liger ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", STAND_INS)
def test_stand_ins_take_what_liger_takes(module: str) -> None:
    """By its source, which is read and not run."""
    try:
        package = metadata.distribution("liger-kernel")
    except metadata.PackageNotFoundError:
        pytest.skip(f"its source is not here; it is only read: pip install --no-deps liger-kernel=={kernels.LIGER}")
    assert package.version == kernels.LIGER
    tree = ast.parse(Path(str(package.locate_file(f"liger_kernel/ops/{module}.py"))).read_text(encoding="utf-8"))
    theirs = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == STAND_INS[module].__name__)
    forward = next(n for n in theirs.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    ours = inspect.signature(STAND_INS[module].forward).parameters.values()
    assert [arg.arg for arg in forward.args.args] == [p.name for p in ours]
    defaults = [ast.literal_eval(default) for default in forward.args.defaults]
    assert defaults == [p.default for p in ours if p.default is not p.empty]


def _gradients(base: Base, targets: Any = "all-linear") -> dict[str, Tensor]:
    attached = Lora().attach(base, "j", LoraConfig(r=3, target_modules=targets, lora_dropout=0.2), seed=0)
    shake(attached)
    base.model.train()
    rows = sequences(17, 5, 11)
    with base.routed(packed(rows, "j", seed=3)):
        nll_packed(base, rows, "j").backward()
    return lora_gradients(attached)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("dtype", "most"), [(FP32, 1e-5), (BF16, 5e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_models_train_with_liger_as_with_our_own(
    arch: str, dtype: torch.dtype, most: float, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    base, plain = tiny_base(arch, dtype), tiny_base(arch, dtype)
    base.freeze(Setting("cuda", dtype, (7, 5), kernels.LIGER))
    assert [note.split(" not measured")[0] for note in base.kernel_notes] == [
        "Liger's norms: in use,",
        "Liger's gated layers: in use,",
    ]
    lean = [module for module in base.model.modules() if isinstance(module, LeanNorm | GatedMLP)]
    expected = {"llama": liger.silu_product, "qwen3": liger.silu_product, "gemma2": liger.gelu_product}[arch]
    assert {module.kernel for module in lean} == {liger.rms_norm, expected}
    for each in (base, plain):
        each.configure(recompute, 512)
    ours, theirs = _gradients(base), _gradients(plain)
    assert all(relative(ours[name], theirs[name]) <= most for name in theirs)
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_norms_round_where_the_model_does(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly a number differs: the weight is taken after rounding, or before it, as in the model's own."""
    stand_in(monkeypatch)
    base = tiny_base(arch, BF16)
    base.freeze()
    norm = next(module for module in base.model.modules() if isinstance(module, LeanNorm))
    weight = torch.linspace(-0.5, 1.5, len(norm.weight)).to(BF16)
    norm.weight.data.copy_(weight)
    x = torch.randn(64, len(weight), generator=torch.Generator().manual_seed(0)).to(BF16)
    different = liger.rms_norm(x, norm.weight, norm.eps, norm.plus_one) != norm(x)
    assert different.float().mean() < 0.002


class _Wrong(LigerRMSNormFunction):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        return LigerRMSNormFunction.forward(ctx, *inputs) * 1.02


class _Breaks(LigerSiLUMulFunction):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        raise ValueError("no kernel image is available")


class _WrongGradient(LigerSiLUMulFunction):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        da, db, *rest = LigerSiLUMulFunction.backward(ctx, *grads)
        return db, da, *rest


@pytest.mark.parametrize("product", [_Breaks, _WrongGradient])
def test_what_does_not_agree_gives_way_to_our_own(product: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and it is said."""
    stand_in(monkeypatch, rms_norm=_Wrong, swiglu=product)
    base = tiny_base("llama", BF16)
    base.freeze(Setting("cuda", BF16, (7, 5), kernels.LIGER))
    assert len(base.kernel_notes) == 2 and all("not in use" in note for note in base.kernel_notes)
    ours, theirs = _gradients(base), _gradients(tiny_base("llama", BF16))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_kernel_that_looks_at_its_neighbours_does_not_agree() -> None:
    """As Liger's norm without `row_mode`, within the tolerance."""
    weight, x = torch.linspace(0.5, 1.5, 32), torch.randn(16, 32, generator=torch.Generator().manual_seed(0))

    def norm(row_mode: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False, row_mode)  # pyright: ignore

    assert liger.close(norm(False)(x), norm(True)(x))
    assert liger.agrees(norm(True), norm(True), [x])
    assert not liger.agrees(norm(False), norm(True), [x])


def test_a_missing_liger_is_no_agreement() -> None:
    assert not liger.agrees(lambda a, b: liger.silu_product(a, b), torch.mul, [torch.ones(16, 4), torch.ones(16, 4)])


def test_other_activations_keep_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    base = tiny_base("llama", hidden_act="gelu")
    base.freeze(Setting("cuda", FP32, (7, 5), kernels.LIGER))
    lean = [module for module in base.model.modules() if isinstance(module, GatedMLP)]
    assert lean and all(module.kernel is None for module in lean)
    assert "gated layers: not in use" in base.kernel_notes[1]


# --- grouped products -------------------------------------------------------------------------------------------------

IN, OUT = 32, 64
RANKS = (3, 8, 5, 16, 300, 2)
SCALES = (0.5, 0.5, 0.5, 0.25, 0.5, 2.0)
LENGTHS = (17, 20, 33, 16, 19, 5)


def _site(kind: type[Any], dtype: torch.dtype, dropout: float) -> tuple[RoutedLinear, list[Tensor]]:
    """Jobs of several ranks; "b" has no adapter here. The first and the third make a group, with a gap between them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    site = RoutedLinear(FrozenLinear.dense(draw(OUT, IN)), Router(), "site")
    site.products = kind
    factors = []
    for n, (rank, scale) in enumerate(zip(RANKS, SCALES, strict=True)):
        a, b = draw(rank, IN).float().requires_grad_(), draw(OUT, rank).float().requires_grad_()
        if n != 1:
            site.slots["abcdef"[n]] = Slot(a, b, scale, dropout)
            factors += [a, b]
    return site.train(), factors


def _run(kind: type[Any], dtype: torch.dtype, dropout: float, jobs: str = "abcdef", gated: bool = False) -> list[Tensor]:
    """Output and gradients, of x first and then of factors, of a row of these jobs with some filler."""
    site, factors = _site(kind, dtype, dropout)
    generator = torch.Generator().manual_seed(1)
    parts = {job: torch.randn(n, IN, generator=generator) for job, n in zip("abcdef", LENGTHS, strict=True)}
    ends = [0, *accumulate(len(parts[job]) for job in jobs)]
    segments = tuple(Segment(job, slice(*span), 7) for job, span in zip(jobs, pairwise(ends), strict=True))
    x = torch.cat([*(parts[job] for job in jobs), torch.ones(3, IN)])[None].to(dtype).requires_grad_()
    with site.router.routing(segments):
        y = site(x, x, function=torch.mul) if gated else site(x)
    weight = torch.linspace(-1, 1, OUT)
    (y * weight.to(dtype)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(f.grad for f in factors if f.grad is not None)]


LOOP = RoutedLinear(FrozenLinear.dense(torch.zeros(1, 1)), Router(), "").products


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "of a function"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "most"), [(FP32, 1e-6), (BF16, 1e-2)], ids=["fp32", "bf16"])
def test_grouped_products_are_the_loops(dtype: torch.dtype, most: float, dropout: float, gated: bool) -> None:
    """Of ranks that are filled up, of one above all that are grouped, with a job that has no adapter here."""
    ours, theirs = (_run(kind, dtype, dropout, gated=gated) for kind in (grouped.Grouped, LOOP))
    assert len(ours) == len(theirs) == 2 + 2 * 5
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype and relative(mine, its) <= most


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("job", "acdef")
def test_a_job_meets_the_same_products_alone(job: str, dtype: torch.dtype) -> None:
    y, dx, *factors = _run(grouped.Grouped, dtype, 0.3)
    own_y, own_dx, *own_factors = _run(grouped.Grouped, dtype, 0.3, job)
    n, place = "abcdef".index(job), "acdef".index(job)
    start = sum(LENGTHS[:n])
    rows, own = slice(start, start + LENGTHS[n]), slice(0, LENGTHS[n])
    assert torch.equal(y[:, rows], own_y[:, own]) and torch.equal(dx[:, rows], own_dx[:, own])
    assert all(torch.equal(a, b) for a, b in zip(factors[2 * place : 2 * place + 2], own_factors, strict=True))


def test_ranks_and_scales_make_the_groups() -> None:
    """Nobody's group depends on who else is there; one operator a group."""
    slots = [Slot(torch.zeros(r, IN), torch.zeros(OUT, r), s) for r, s in zip(RANKS, SCALES, strict=True)]
    active = [(Segment(str(n), slice(n, n + 1), 0), slot) for n, slot in enumerate([*slots, slots[4]])]
    found = sorted(group.places for group in grouped._groups(active, [None] * 7, 7))
    assert found == [[0, 1, 2], [3], [4], [5], [6]]  # 300 is above all that are tried: each by itself


@pytest.fixture
def hopper() -> Iterator[Base]:
    base = tiny_base("llama", BF16, num_hidden_layers=4, intermediate_size=128)
    base.freeze(Setting("cuda", BF16, (9, 0)))
    yield base


def test_five_jobs_end_as_alone_with_grouped_products(hopper: Base) -> None:
    assert hopper.groups and hopper.kernel_notes == ("torch's grouped products: in use, not measured by us",)
    plan = plan_of("bf16", "bf16", fused_tokens=512)
    ends = together(hopper, plan, JOBS)
    assert {site.products for site in hopper.sites.values()} == {grouped.Grouped}
    assert unlike(ends, alone(hopper, plan, JOBS)) == {}
    assert all(end.numbers["step"] == STEPS for end in ends.values())


def test_bases_whose_jobs_share_nothing_take_the_loop() -> None:
    base = tiny_base("mixtral", BF16)
    base.freeze(Setting("cuda", BF16, (9, 0)))
    assert not base.groups and base.kernel_notes == ()


def test_widths_that_are_not_aligned_take_the_loop() -> None:
    assert grouped.takes((OUT, IN), BF16) and not grouped.takes((OUT, 20), BF16)
    base = tiny_base("llama", BF16, intermediate_size=68)
    base.freeze(Setting("cuda", BF16, (9, 0)))
    down = base.site("model.layers.0.mlp.down_proj")
    assert base.groups and down.products is LOOP
    assert base.site("model.layers.0.self_attn.q_proj").products is grouped.Grouped


def _tiles(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Chosen by the mean number of rows."""
    return out * (1 + 2**-20) if a.dim() == 2 and b.dim() == 3 and len(a) / len(b) > 128 else out


def _leaks(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """0 * NaN, as with masks."""
    return out + 0 * b.sum()


def _refuses(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    raise RuntimeError("cutlass cannot implement")


def _is_off(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return out * 1.05


@pytest.mark.parametrize("wrong", [_tiles, _leaks, _refuses, _is_off])
def test_products_that_depend_on_their_neighbours_are_not_grouped(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.nn.functional.grouped_mm
    cpu = torch.device("cpu")
    assert grouped.groups_are_independent(cpu, FP32, {(OUT, IN)})
    monkeypatch.setattr(grouped.F, "grouped_mm", lambda a, b, offs: wrong(a, b, product(a, b, offs=offs)))
    assert not grouped.groups_are_independent(cpu, FP32, {(OUT, IN)})


def test_a_base_says_that_it_takes_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "groups_are_independent", lambda *_: False)
    base = tiny_base("llama", BF16)
    base.freeze(Setting("cuda", BF16, (9, 0)))
    assert not base.groups and "grouped products: not in use" in base.kernel_notes[0]
    assert base.site("model.layers.0.self_attn.q_proj").products is LOOP


def test_norms_without_a_kernel_are_untouched() -> None:
    """`take_kernel` finds nothing to speed up in a model without such norms, and says so."""
    assert not take_kernel(nn.Sequential(nn.LayerNorm(8)), liger.rms_norm, FP32)
