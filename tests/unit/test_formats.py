"""Formats of weights at rest. Truths: NF4 as QLoRA's paper defines it and int8 rows, in plain torch here; bitsandbytes.

bitsandbytes' own way back is wrong on CPU where blocks cross rows (0.50.2), so it is a truth for whole blocks a row alone.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, quantize_4bit
from torch import Tensor

from conftest import relative
from snugtune.model import formats, reference
from snugtune.model.formats import W8A8, Bits4, Dense, Format, Int8, Outliers, Parts
from snugtune.model.frozen import FrozenLinear
from snugtune.model.reference import true_use

SHAPES = [(5, 64), (7, 96), (3, 62), (5, 63), (1, 2), (33, 130), (4, 1), (128, 128)]
"""Whole blocks a row, blocks across rows, a last block that is not full, an odd number of weights."""
FORMATS: dict[str, Format] = {
    "nf4": Bits4(),
    "nf4-double": Bits4(double=True),
    "fp4": Bits4(kind="fp4"),
    "fp4-double-128": Bits4(128, True, "fp4"),
    "int8": Int8(),
    "int8-products": Outliers(2.0),
    "w8a8": W8A8(),
}


def _weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def _nf4_code() -> Tensor:
    """QLoRA, section 3 and appendix E: quantiles of a normal distribution, 8 above zero and 7 below, exact 0, scaled to 1."""
    offset = 0.9677083
    quantiles = lambda count: torch.special.ndtri(torch.linspace(offset, 0.5, count, dtype=torch.float64))[:-1]  # noqa: E731
    code = torch.cat((-quantiles(8), torch.zeros(1, dtype=torch.float64), quantiles(9))).sort().values
    return (code / code.max()).float()


FP4 = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12  # sign, two bits of exponent, one of mantissa
CODES = {"nf4": _nf4_code(), "fp4": torch.cat((FP4, -FP4))}


def _true_4bit(weight: Tensor, format: Bits4) -> Tensor:
    """Each number to the nearest of the code times its block's largest magnitude; scales in 8 bits where nested."""
    flat = weight.float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % format.block)).view(-1, format.block)
    absmax = blocks.abs().amax(dim=1)
    code = CODES[format.kind]
    unit = (blocks / absmax.clamp_min(1e-38)[:, None]).clamp(-1, 1)
    nearest = code[(unit[..., None] - code).abs().argmin(dim=-1)]
    if format.double:
        offset, dynamic = absmax.mean(), create_dynamic_map()
        groups = F.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        top = groups.abs().amax(dim=1, keepdim=True)
        rounded = dynamic[((groups / top.clamp_min(1e-38))[..., None] - dynamic).abs().argmin(dim=-1)]
        absmax = (rounded * top).flatten()[: len(absmax)] + offset
    return (nearest * absmax[:, None]).flatten()[: len(flat)].view(weight.shape)


def _true_int8(weight: Tensor) -> Tensor:
    scale = weight.float().abs().amax(dim=1, keepdim=True)
    return torch.where(scale > 0, (weight / scale * 127).round() * (scale / 127), 0.0)


def _truth(weight: Tensor, format: Format) -> Tensor:
    return _true_4bit(weight, format) if isinstance(format, Bits4) else _true_int8(weight)


def _back(weight: Tensor, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    return format.decode(format.encode(weight), (weight.shape[0], weight.shape[1]), dtype)


def _plainly(format: Format, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight as the self-test decodes it."""
    return torch.cat([reference.reference_rows(format, parts, shape, dtype, rows) for rows in reference.pieces(shape)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_comes_back_as_its_format_defines_it(name: str, shape: tuple[int, int]) -> None:
    """Also by the plain decoder of the self-test; in bf16 and fp16 it is the same weight, rounded. The layout was foretold."""
    format, weight = FORMATS[name], _weight(shape)
    parts = format.encode(weight)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} == format.layout(*shape)
    wide = format.decode(parts, shape, torch.float32)
    assert relative(wide, _truth(weight, format)) <= 1e-3  # a tie may be rounded either way
    assert (~torch.isclose(wide, _truth(weight, format), rtol=2e-6, atol=1e-8)).float().mean() <= 0.01
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = format.decode(parts, shape, dtype)
        assert narrow.dtype == dtype and narrow.shape == shape
        assert relative(narrow, wide) <= torch.finfo(dtype).eps
        assert relative(_plainly(format, parts, shape, dtype), narrow) <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
def test_bits_are_those_of_bitsandbytes(block: int, kind: str, double: bool, dtype: torch.dtype) -> None:
    """Its functions, whole: the packed numbers, the scales, and the weight that comes back."""
    weight = _weight((48, 256)).to(dtype)
    packed, state = quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)
    format = Bits4(block, double, kind)
    parts = format.encode(weight)
    assert torch.equal(parts["packed"], packed.view(-1)) and torch.equal(parts["absmax"], state.absmax)
    if double:
        assert torch.equal(parts["nested_absmax"], state.state2.absmax) and torch.equal(parts["offset"][0], state.offset)
    assert torch.equal(format.decode(parts, (48, 256), dtype), dequantize_4bit(packed, state))


def test_int8_rows_are_those_of_bitsandbytes() -> None:
    weight = _weight((33, 130))
    q, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight)
    parts = Int8().encode(weight)
    assert torch.equal(parts["int8"], q) and torch.equal(parts["scale"], scale)
    torch.testing.assert_close(_back(weight, Int8()), torch.ops.bitsandbytes.int8_vectorwise_dequant.default(q, scale))


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding and decoding go piece by piece: bit-equal to all at once, wherever the pieces end."""
    format, weight = FORMATS[name], _weight((37, 96))
    whole, back = format.encode(weight), _back(weight, format)
    for piece in (256, 640, 1000):
        monkeypatch.setattr(formats, "PIECE", piece)
        monkeypatch.setattr(reference, "PIECE", piece)
        parts = format.encode(weight)
        assert all(torch.equal(parts[part], tensor) for part, tensor in whole.items())
        assert torch.equal(format.decode(parts, (37, 96), torch.float32), back)
        assert torch.equal(_plainly(format, parts, (37, 96), torch.float32), back)


def test_a_weight_larger_than_a_piece() -> None:
    """At the real size of a piece, with the last one not full."""
    weight = _weight((1030, 1026))
    assert weight.numel() > formats.PIECE
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    parts = Bits4().encode(weight)
    assert torch.equal(parts["packed"], packed.view(-1)) and torch.equal(parts["absmax"], state.absmax)
    assert relative(_back(weight, Int8()), _true_int8(weight)) <= 1e-4


@pytest.mark.parametrize("name", FORMATS)
def test_a_transposed_view_is_encoded_as_it_reads(name: str) -> None:
    """Conv1D keeps [in, out]; what is encoded is its transposed view."""
    weight, format = _weight((64, 96)), FORMATS[name]
    assert torch.equal(_back(weight.t(), format), _back(weight.t().contiguous(), format))


EXTREMES: dict[str, Any] = {
    "zeros": lambda w: w.zero_(),
    "a row of zeros": lambda w: w[1].zero_(),
    "a block of zeros": lambda w: w.view(-1)[64:128].zero_(),
    "huge": lambda w: w.mul_(1e37),
    "tiny": lambda w: w.mul_(1e-34),
    "one huge": lambda w: w[2, 5].fill_(3e38),
    "one sign": lambda w: w.abs_(),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("name", FORMATS)
def test_extreme_weights_come_back(name: str, case: str) -> None:
    """Finite, and each within what its format allows of the truth: zeros as zeros."""
    weight, format = _weight((6, 96)), FORMATS[name]
    EXTREMES[case](weight)
    back = _back(weight, format)
    assert back.isfinite().all()
    double = isinstance(format, Bits4) and format.double
    if not double:  # there scales are offset by the mean of all: blocks of zeros share an error, and so do far smaller ones
        torch.testing.assert_close(back, _truth(weight, format), rtol=1e-5, atol=float(weight.abs().max()) * 1e-6)
        assert not back[weight == 0].any()
    assert float((back - weight).abs().max()) <= float(weight.abs().max()) * 0.4


@pytest.mark.parametrize("name", FORMATS)
def test_denormal_rows_do_not_overflow(name: str) -> None:
    """127 divided by the smallest of numbers would be infinite."""
    weight = _weight((4, 64))
    weight[1] *= 1e-40
    back = _back(weight, FORMATS[name])
    assert back.isfinite().all() and relative(back, weight) < 0.2


ERRORS = {"nf4": 0.0918, "nf4-double": 0.0925, "fp4": 0.127, "int8": 0.0075}
"""||W' - W|| / ||W|| of normally distributed weights; docs speak of these."""


@pytest.mark.parametrize("name", ERRORS)
def test_weight_errors_are_what_they_are_said_to_be(name: str) -> None:
    weight = _weight((256, 576))
    assert relative(_back(weight, FORMATS[name]), weight) == pytest.approx(ERRORS[name], rel=0.05)


@pytest.mark.parametrize(("format", "bits"), [(Bits4(), 4.5), (Bits4(double=True), 4.127), (Int8(), 8.0)], ids=lambda v: str(v))
def test_sizes_are_what_they_are_said_to_be(format: Format, bits: float) -> None:
    """For a weight that is large against what comes with each: bits a weight."""
    layout = format.layout(4096, 16384)
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
    assert size * 8 / (4096 * 16384) == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_is_the_weight_itself(dtype: torch.dtype) -> None:
    weight = _weight((5, 6))
    parts = Dense(dtype).encode(weight)
    assert torch.equal(parts["dense"], weight.to(dtype)) and Dense(dtype).decode(parts, (5, 6), dtype) is parts["dense"]
    assert Dense(dtype).name in ("fp32", "bf16", "fp16") and Dense(dtype).layout(5, 6) == {"dense": (dtype, (5, 6))}


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("int8-products", "w8a8")])
def test_products_and_gradients_are_those_of_the_weight(name: str, bias: bool, dtype: torch.dtype) -> None:
    format, weight, b = FORMATS[name], _weight((24, 96)), _weight((1, 24))[0].to(dtype) if bias else None
    layer = FrozenLinear(format, format.encode(weight), (24, 96), b, dtype)
    x, dy = (_weight(shape, seed).to(dtype) for seed, shape in enumerate(((20, 96), (20, 24))))
    x.requires_grad_()
    truth = F.linear(x, layer.weight, b)
    (gradient,) = torch.autograd.grad(truth, x, dy)
    y = layer(x)
    assert torch.equal(y, truth) and torch.equal(torch.autograd.grad(y, x, dy)[0], gradient)
    assert layer(x.view(4, 5, 96)).shape == (4, 5, 24)


def _activations(rows: int, seed: int = 0) -> Tensor:
    """Normal, with a few outliers in columns of their own, as in language models."""
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed))
    x[::3, 7] *= 40
    x[1::4, 31] = -25.0
    x[2, 50] = 9.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_int8_products_round_activations_but_for_outliers(bias: bool, dtype: torch.dtype) -> None:
    """Against the weight times what int8 makes of each row; what is far out is not rounded."""
    format, weight = Outliers(6.0), _weight((24, 96))
    b = _weight((1, 24))[0].to(dtype) if bias else None
    layer = FrozenLinear(format, format.encode(weight), (24, 96), b, dtype)
    x = _activations(20).to(dtype).requires_grad_()
    far = x.abs() >= 6.0
    near = _true_int8(x.detach().float().masked_fill(far, 0))
    rounded = torch.where(far, x.detach().float(), near)
    plain = format.decode(layer.parts(), (24, 96), torch.float32)
    truth = F.linear(rounded.double(), plain.double(), None if b is None else b.double())
    y = layer(x)
    assert y.dtype == dtype and relative(y, truth) <= torch.finfo(dtype).eps
    assert 1e-4 < relative(y, F.linear(x.float(), plain, None if b is None else b.float())) < 2e-2
    dy = _weight((20, 24), 3).to(dtype)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_no_row_depends_on_its_neighbours(name: str, dtype: torch.dtype) -> None:
    """Forward and backward, bit for bit, whatever outliers the neighbours have in whichever columns; a NaN stays where it is."""
    format, weight = FORMATS[name], _weight((64, 96))
    layer = FrozenLinear(format, format.encode(weight), (64, 96), None, dtype)
    rows, others = _activations(16).to(dtype), _activations(48, 1).to(dtype) * 5
    others[3, 11] = math.nan
    together = torch.cat((others[:9], rows, others[9:]))
    assert torch.equal(layer.matmul(together)[9:25], layer.matmul(rows))
    dy = torch.cat((others[:9, :64], rows[:, :64], others[9:, :64])).contiguous()
    assert torch.equal(layer.matmul_t(dy)[9:25], layer.matmul_t(rows[:, :64].contiguous()))


def test_rows_without_an_outlier_and_empty_rows_are_taken_in_int8_too() -> None:
    layer = FrozenLinear(Outliers(6.0), Int8().encode(_weight((24, 96))), (24, 96), None, torch.float32)
    x = _activations(20).clamp(-3, 3)
    x[4] = 0
    y = layer.matmul(x)
    assert y.isfinite().all() and not y[4].any() and relative(y, F.linear(x, layer.weight)) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_w8a8_rounds_what_it_multiplies_forward_and_backward(bias: bool, dtype: torch.dtype) -> None:
    """Against exact products of the weight and what int8 makes of each row: of x, and of dy with the weight's scales in it."""
    format, weight = W8A8(), _weight((24, 96))
    b = _weight((1, 24))[0].to(dtype) if bias else None
    layer = FrozenLinear(format, format.encode(weight), (24, 96), b, dtype)
    plain, scale = format.decode(layer.parts(), (24, 96), torch.float32), layer.parts()["scale"][:, None]
    x = _activations(20).to(dtype).requires_grad_()
    truth = F.linear(_true_int8(x.detach().float()).double(), plain.double(), None if b is None else b.double())
    y = layer(x)
    assert y.dtype == dtype and relative(y, truth) <= torch.finfo(dtype).eps
    assert 1e-4 < relative(y, F.linear(x.float(), plain, None if b is None else b.float())) < 3e-2
    dy = _weight((20, 24), 3).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = _true_int8(dy.float() * scale.t()).double() @ (plain / scale).double()
    assert dx.dtype == dtype and relative(dx, exact) <= torch.finfo(dtype).eps
    assert 1e-4 < relative(dx, dy.float() @ plain) < 3e-2


def test_w8a8_takes_any_number_of_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    format, weight = W8A8(), _weight((24, 96))
    layer = FrozenLinear(format, format.encode(weight), (24, 96), None, torch.bfloat16)
    x, dy = (_weight((37, side), side).bfloat16() for side in (96, 24))
    whole = layer.matmul(x), layer.matmul_t(dy)
    monkeypatch.setattr("snugtune.model.formats._INT8_PIECE", 5 * 96)
    assert torch.equal(layer.matmul(x), whole[0]) and torch.equal(layer.matmul_t(dy), whole[1])
    assert layer.matmul(x[:0]).shape == (0, 24) and layer.matmul_t(dy[:0]).shape == (0, 96)


def test_a_stored_row_of_zeros_has_no_scale() -> None:
    """As bitsandbytes writes it: its gradient is zero, for the product and for what the self-test holds that against."""
    parts = W8A8().encode(_weight((24, 96)))
    parts["int8"][3], parts["scale"][3] = 0, 0.0
    layer = FrozenLinear(W8A8(), parts, (24, 96), None, torch.float32)
    x, dy = _weight((20, 96), 1), _weight((20, 24), 2)
    y, dx, _ = true_use(layer, parts, None, x, dy)
    assert relative(layer.matmul(x), y) < 1e-5 and relative(layer.matmul_t(dy), dx) < 1e-5
    assert not layer.matmul(x)[:, 3].any()
