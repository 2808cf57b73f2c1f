"""`snugtune doctor`: facts read from the places they stand in, products that are really computed, a document that stays."""

import io
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole
from rich.text import Text

from snugtune import allocator, doctor, gemm, machine
from snugtune.console import Console

KEYS = """\
versions.snugtune versions.python versions.torch versions.transformers versions.tokenizers versions.peft versions.safetensors
versions.huggingface_hub versions.gguf versions.pydantic extras.name extras.installed extras.missing extras.install platform
processor.model processor.features processor.capability processor.cores processor.usable gpus memory.total memory.available
memory.limit memory.limit_free folders.name folders.path folders.used folders.free threads.torch threads.interop
 threads.omp_num_threads threads.mkl_num_threads threads.cpu_quota allocator.name allocator.ld_preload
 allocator.malloc_arena_max allocator.arenas allocator.kernels auto.device auto.weights auto.reasons kernels.norms
 kernels.gated_layers kernels.head kernels.attention kernels.adapters formats.device formats.name formats.runs formats.gflops
 formats.size formats.error formats.reason
"""
"""What scripts may read. Adding is free; anything else breaks them."""

GIB = 2**30


def paths(value: Any, at: str = "") -> list[str]:
    """The dotted names of all leaves, lists by their first entry."""
    if isinstance(value, dict):
        return [p for key, inner in value.items() for p in paths(inner, f"{at}.{key}".strip("."))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return paths(value[0], at)
    return [at]


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


# --- the document -----------------------------------------------------------------------------------------------------


def test_json_keeps_its_keys(report: doctor.Report) -> None:
    found = json.loads(doctor.to_json(report))
    found["gpus"] = []  # differs by machine; its fields are pinned below
    assert paths(found) == KEYS.split()
    gpu = machine.Gpu("name", "8.9", 2, 1)
    assert list(asdict(gpu)) == ["name", "capability", "total", "free"]


def test_numbers_are_sane(report: doctor.Report) -> None:
    assert report.versions["torch"] == torch.__version__
    assert 1 <= report.processor.usable <= report.processor.cores
    assert 0 < report.memory.available <= report.memory.total
    assert all(f.free > 0 for f in report.folders)
    assert report.threads.torch >= 1
    assert report.auto.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert any(f"weights {report.auto.weights}" in reason for reason in report.auto.reasons)
    assert {f.name for f in report.formats} == {"fp32", "bf16", "fp16", "int8", "fp8"}
    for f in report.formats:
        assert f.runs == (f.gflops is not None) == (f.error is not None) == (f.reason is None)
        assert not f.runs or (f.gflops or 0) > 0
    assert next(f for f in report.formats if f.name == report.auto.weights).runs, "auto chooses what runs"


def test_the_parts_of_the_cache_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path))
    assert not doctor._cache_parts()
    written(tmp_path, {"tokens/a": "12345", "streamed/model-0/blocks/b": "x" * (GIB >> 6), "file": "1"})
    assert [(f.name, f.path, f.used) for f in doctor._cache_parts()] == [
        ("SNUGTUNE_CACHE/streamed", str(tmp_path / "streamed"), GIB >> 6),
        ("SNUGTUNE_CACHE/tokens", str(tmp_path / "tokens"), 5),
    ]
    lines = doctor._sections(doctor.examine(quick=True))["folders"]
    assert f"  {tmp_path / 'streamed'}: 0.02 GiB of that" in lines


# --- matrix products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gemm.WAYS)
def test_products_are_those_of_fp32(name: str) -> None:
    """Each format's own product and scales give the fp32 product back, to the precision of the format, and not better."""
    way = gemm.WAYS[name]
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator) * 30
    (left, scale), (right, other) = way.prepare(a), way.prepare(b)
    try:
        ours = way.product(left, right).float() * scale * other
    except RuntimeError:
        assert not gemm.measure(name, "cpu", 0.0).runs
        return
    error = float((ours - a @ b).norm() / (a @ b).norm())
    assert error <= way.tolerance
    if name != "fp32":
        assert left.dtype == right.dtype != torch.float32
        assert error > 1e-5


def test_a_slow_format_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that makes every product take as long as on a slow machine: no size is tried that would take long."""
    now = [0.0]
    sizes: list[int] = []

    def slow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sizes.append(len(a))
        now[0] += 0.02 * (len(a) / gemm.SMALLEST) ** 3  # 0.2 GFLOP/s
        return a @ b

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(gemm.WAYS, "slow", gemm._Way(lambda x: (x, 1.0), slow, 1e-3))
    found = gemm.measure("slow", "cpu", 0.05)
    assert found.size == gemm.SMALLEST
    assert found.gflops == pytest.approx(2 * gemm.SMALLEST**3 / 0.02 / 1e9)
    assert len(sizes) <= 6 and set(sizes) == {gemm.SMALLEST}


def test_a_fast_format_is_measured_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gemm.LARGEST, "cpu", 256)
    assert gemm.measure("fp32", "cpu", 0.01).size == 256


def test_what_does_not_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel for this\nException raised from somewhere.cpp:1")

    monkeypatch.setitem(gemm.WAYS, "none", gemm._Way(lambda x: (x, 1.0), none, 1e-3))
    monkeypatch.setitem(gemm.WAYS, "wrong", gemm._Way(lambda x: (x, 1.0), lambda a, b: b @ a, 1e-3))
    assert gemm.measure("none", "cpu") == gemm.Format("cpu", "none", False, reason="no kernel for this")
    wrong = gemm.measure("wrong", "cpu")
    assert not wrong.runs and "wrong" in str(wrong.reason)


# --- the machine ------------------------------------------------------------------------------------------------------


def test_processor_of_another_machine(tmp_path: Path) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 amx_tile amx_bf16 avx512_bf16\n\nprocessor\t: 1\n"
    found = machine.processor(written(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert (found.model, found.features) == ("Xeon", ("avx2", "avx512_bf16", "amx_tile", "amx_bf16"))
    assert machine.processor(tmp_path / "none").model, "no /proc: still named"


MEMINFO = {"proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\n"}


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({}, None, None),
        # cgroup v2: the narrowest of the groups around it
        (
            {
                "proc/self/cgroup": "0::/box/inner\n",
                "sys/fs/cgroup/box/inner/memory.max": "max\n",
                "sys/fs/cgroup/box/inner/memory.current": str(GIB),
                "sys/fs/cgroup/box/memory.max": str(4 * GIB),
                "sys/fs/cgroup/box/memory.current": str(3 * GIB),
            },
            4 * GIB,
            GIB,
        ),
        # inside a container its own group stands at the top
        (
            {
                "proc/self/cgroup": "0::/docker/0123\n",
                "sys/fs/cgroup/memory.max": str(2 * GIB),
                "sys/fs/cgroup/memory.current": "0",
            },
            2 * GIB,
            2 * GIB,
        ),
        # cgroup v1, without a limit and with one
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
            },
            None,
            None,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(3 * GIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(4 * GIB),
            },
            3 * GIB,
            0,
        ),
    ],
    ids=["none", "v2", "v2-container", "v1-unlimited", "v1"],
)
def test_memory_knows_containers(tmp_path: Path, files: dict[str, str], limit: int | None, free: int | None) -> None:
    found = machine.memory(written(tmp_path, MEMINFO | files))
    assert found == machine.Memory(16 * GIB, 8 * GIB, limit, free)


def test_folder_counts_what_it_holds(tmp_path: Path) -> None:
    written(tmp_path, {"cache/a": "12345", "cache/deep/b": "123"})
    (tmp_path / "cache/link").symlink_to(tmp_path)
    assert 8 <= (machine.folder("cache", tmp_path / "cache", count=True).used or 0) < 8 + 4096
    none = machine.folder("none", tmp_path / "not/there", count=True)
    assert none.used == 0 and none.free > 0
    assert machine.folder("cache", tmp_path / "cache").used is None


def test_allocator(tmp_path: Path) -> None:
    glibc = machine.allocator({}, written(tmp_path, {"proc/self/maps": "7f00 r-xp /usr/lib/libc.so.6\n"}))
    assert (glibc.ld_preload, glibc.malloc_arena_max) == (None, None)
    assert glibc.name not in allocator.KNOWN and (glibc.arenas or 8) >= 8
    preloaded = machine.allocator({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2", "MALLOC_ARENA_MAX": "2"}, tmp_path / "none")
    assert (preloaded.name, preloaded.malloc_arena_max, preloaded.arenas) == ("jemalloc", "2", None)
    assert machine.allocator({"MALLOC_ARENA_MAX": "2"}, tmp_path / "none").arenas in (2, None)  # None: not glibc
    mapped = machine.allocator({}, written(tmp_path, {"proc/self/maps": "7f00 r-xp /usr/lib/libtcmalloc_minimal.so.4\n"}))
    assert mapped.name == "tcmalloc"


def test_threads_follow_the_environment() -> None:
    found = machine.threads({"OMP_NUM_THREADS": "3"})
    assert found.torch == torch.get_num_threads()
    assert (found.omp_num_threads, found.mkl_num_threads) == ("3", None)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n3:cpuset:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
    ids=["none", "v2-max", "v2", "v2-tightest", "v1", "v1-unlimited"],
)
def test_threads_know_containers(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    root = written(tmp_path, files)
    assert machine.cpu_quota(root) == machine.threads({}, root).cpu_quota == quota


def test_a_container_that_allows_less_than_is_computed_on() -> None:
    cpu = machine.Processor("", (), "", 8, 4)
    assert len(doctor._threads(machine.Threads(4, 2, None, None, 4.0), cpu)) == 2
    line = doctor._threads(machine.Threads(4, 2, None, None, 2.5), cpu)[-1]
    assert "2.5 cores" in line and "OMP_NUM_THREADS=2" in line
    assert "OMP_NUM_THREADS=1 " in doctor._threads(machine.Threads(4, 2, None, None, 0.5), cpu)[-1]


def test_what_a_run_keeps_of_compiled_products(tmp_path: Path) -> None:
    """For each job in a forward; the user's own setting stays."""
    found: dict[str, str] = {"LRU_CACHE_CAPACITY": "7"}
    machine.keep_few_kernels(2, found)
    assert found == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(2 * machine.KERNELS)}
    assert machine.allocator(found, tmp_path).kernels == (str(2 * machine.KERNELS), "7")
    many: dict[str, str] = {}
    machine.keep_few_kernels(1000, many)
    assert set(many.values()) == {"1024"}


def test_extras_tell_what_is_missing() -> None:
    requires = [
        "torch>=2",
        'pydantic>=2; extra == "small"',
        'no-such-package>=1; extra == "big"',
        'pydantic>=9999; extra == "big"',
        'snugtune[big]; extra == "all"',
        'other-none; extra == "all" and python_version < "3"',
    ]
    small, big, everything = doctor.extras(["small", "big", "all"], requires)
    assert small == doctor.Extra("small", True, (), None)
    assert big == doctor.Extra("big", False, ("no-such-package", "pydantic"), "pip install 'snugtune[big]'")
    assert everything.missing == big.missing


# --- what people see --------------------------------------------------------------------------------------------------


def console(width: int, terminal: bool) -> Console:
    shown = Console()
    shown.out = RichConsole(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    shown.err = RichConsole(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    return shown


@pytest.mark.parametrize(("width", "terminal"), [(60, True), (120, True), (80, False)])
def test_tables_fit(report: doctor.Report, width: int, terminal: bool) -> None:
    shown = console(width, terminal)
    shown.out.print(doctor._facts(report))
    shown.out.print(doctor._formats(report))
    text = shown.out.file.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b" in text) == terminal
    lines = [Text.from_ansi(line).plain for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert all("…" not in line for line in lines), "nothing is cut off"
    assert sum("<- auto" in line for line in lines) == 1
    assert any(line.startswith("allocator") for line in lines)


def test_quick_multiplies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "measure", lambda *_: pytest.fail("a product was measured"))
    shown = console(80, terminal=False)
    doctor.run_doctor(shown, as_json=True, quick=True)
    assert json.loads(shown.out.file.getvalue())["formats"] == []  # type: ignore[attr-defined]
    assert shown.err.file.getvalue() == ""  # type: ignore[attr-defined]
