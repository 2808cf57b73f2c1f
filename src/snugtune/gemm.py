"""Which number formats this machine multiplies matrices in, how fast, and how exactly: by doing it.

A format may be so slow (fp16 on many CPUs) that a fixed size would take minutes: sizes grow only while they stay quick.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 128
LARGEST = {"cpu": 1024, "cuda": 8192}
LONGEST = 0.1
"""Seconds that one product may be expected to take."""
REPEATS = 7
SECONDS = 0.4
"""For the repeats of one format together."""


@dataclass(frozen=True)
class Format:
    """One number format on one device, as measured. `error`: relative (Frobenius) against the product in fp64."""

    device: str
    name: str
    runs: bool
    gflops: float | None = None  # 1e9 additions and multiplications a second
    size: int | None = None  # of the square matrices
    error: float | None = None
    reason: str | None = None  # why it does not run


Operands = tuple[Tensor, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Way:
    """How a format is computed. `prepare` brings one fp32 matrix into it and gives the factor that was divided out."""

    prepare: Callable[[Tensor], tuple[Tensor, float]]
    product: Product
    tolerance: float  # of the error; beyond it the format does not work


def _cast(dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, float]]:
    return lambda x: (x.to(dtype), 1.0)


def _int8(x: Tensor) -> tuple[Tensor, float]:
    scale = float(x.abs().max()) / 127
    return (x / scale).round().to(torch.int8), scale


def _fp8(x: Tensor) -> tuple[Tensor, float]:
    scale = float(x.abs().max()) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def _scaled(a: Tensor, b: Tensor) -> Tensor:
    one = torch.ones((), device=a.device)
    return torch.ops.aten._scaled_mm(a, b.t().contiguous().t(), one, one, out_dtype=torch.bfloat16)  # wants b by columns


WAYS = {
    "fp32": _Way(_cast(torch.float32), torch.mm, 1e-2),  # TF32 on GPUs keeps 10 bits
    "bf16": _Way(_cast(torch.bfloat16), torch.mm, 2e-2),
    "fp16": _Way(_cast(torch.float16), torch.mm, 5e-3),
    "int8": _Way(_int8, torch.ops.aten._int_mm, 5e-2),
    "fp8": _Way(_fp8, _scaled, 0.1),
}
"""Each number format that may run: fp8 is float8_e4m3fn."""


def measure(name: str, device: str, seconds: float = SECONDS) -> Format:
    """Compute in one format: the median speed of short repeats after a warm-up, `seconds` for them together."""
    way = WAYS[name]
    try:
        error = _error(way, device)
        if not error <= way.tolerance:
            return Format(device, name, False, reason=f"its products are wrong (relative error {error:.2g})")
        size, took = _largest_quick(way, device)
        times = [took]
        ends = time.perf_counter() + seconds
        a, b = _operands(way, size, device)
        while len(times) < REPEATS and time.perf_counter() < ends:
            times.append(_time(way.product, a, b))
    except (RuntimeError, NotImplementedError, TypeError) as failure:  # what torch raises for a format it has no kernel for
        return Format(device, name, False, reason=str(failure).strip().partition("\n")[0] or type(failure).__name__)
    return Format(device, name, True, 2 * size**3 / statistics.median(times) / 1e9, size, error)


def measure_all(device: str, seconds: float = SECONDS) -> tuple[Format, ...]:
    return tuple(measure(name, device, seconds) for name in WAYS)


def _random(size: int) -> Operands:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, size, generator=generator), torch.randn(size, size, generator=generator)


def _operands(way: _Way, size: int, device: str) -> Operands:
    a, b = _random(size)
    return way.prepare(a.to(device))[0], way.prepare(b.to(device))[0]


def _error(way: _Way, device: str) -> float:
    a, b = _random(SMALLEST)
    (left, scale), (right, other) = way.prepare(a.to(device)), way.prepare(b.to(device))
    product = way.product(left, right).double().cpu() * scale * other
    truth = a.double() @ b.double()
    return float((product - truth).norm() / truth.norm())


def _largest_quick(way: _Way, device: str) -> tuple[int, float]:
    """The largest size whose product is quick, and how long it took once warm."""
    size = SMALLEST
    while True:
        a, b = _operands(way, size, device)
        _time(way.product, a, b)
        took = _time(way.product, a, b)
        if size >= LARGEST[device] or 8 * took > LONGEST:  # twice the size is eight times the work
            return size, took
        size *= 2


def _time(product: Product, a: Tensor, b: Tensor) -> float:
    begun = time.perf_counter()
    product(a, b)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
