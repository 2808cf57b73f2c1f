"""`snugtune doctor`: what is installed, what this machine has, and what it computes how fast."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import huggingface_hub.constants
import torch
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from snugtune import __version__, gemm, machine
from snugtune.config import RunConfig, to_config
from snugtune.console import Console
from snugtune.memory.plan import make_plan
from snugtune.memory.precision import precision
from snugtune.model.gguf import cache_dir
from snugtune.model.kernels import described, setting_of
from snugtune.model.load import DTYPES, load_config, stored_width
from snugtune.model.source import find_model
from snugtune.words import gib

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "huggingface_hub", "gguf", "pydantic")


@dataclass(frozen=True)
class Extra:
    """An optional part of snugtune: `missing` are the packages it lacks, `install` the line that brings them."""

    name: str
    installed: bool
    missing: tuple[str, ...]
    install: str | None


@dataclass(frozen=True)
class Choice:
    """What `auto` means on this machine."""

    device: str
    weights: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Everything `doctor` says. With `--json` its fields are the document."""

    versions: Mapping[str, str | None]  # None: not installed
    extras: tuple[Extra, ...]
    platform: str
    processor: machine.Processor
    gpus: tuple[machine.Gpu, ...]
    memory: machine.Memory
    folders: tuple[machine.Folder, ...]
    threads: machine.Threads
    allocator: machine.Allocator
    auto: Choice
    kernels: Mapping[str, str]  # part of a model -> what computes it, as auto has it
    formats: tuple[gemm.Format, ...]  # none with --quick


def examine(quick: bool = False) -> Report:
    """Look at everything; `quick` leaves out the products of matrices, which take a few seconds."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return Report(
        versions={"snugtune": __version__, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        extras=extras(*_declared()),
        platform=platform.platform(),
        processor=machine.processor(),
        gpus=machine.gpus(),
        memory=machine.memory(),
        folders=(
            machine.folder("working folder", Path.cwd()),
            machine.folder("SNUGTUNE_CACHE", cache_dir(), count=True),
            *_cache_parts(),
            machine.folder("HF_HOME", Path(huggingface_hub.constants.HF_HOME), count=True),
        ),
        threads=machine.threads(),
        allocator=machine.allocator(),
        auto=_choice(),
        kernels=_kernels(),
        formats=() if quick else tuple(f for device in devices for f in gemm.measure_all(device)),
    )


def _cache_parts() -> tuple[machine.Folder, ...]:
    """What snugtune keeps, each kind in a folder of its own: tokens, traces, streamed weights, converted GGUF files, ..."""
    parts = sorted(path for path in cache_dir().glob("*") if path.is_dir())
    return tuple(machine.folder(f"SNUGTUNE_CACHE/{path.name}", path, count=True) for path in parts)


def _choice() -> Choice:
    """The planner's own answer for a config that leaves everything to it."""
    planned = make_plan(to_config({"model": "any", "data": "any", "output": "any"}))
    return Choice(planned.plan.device, planned.plan.weights, planned.reasons)


def _kernels() -> dict[str, str]:
    """What `auto` would compute each part of a model with."""
    plan = make_plan(to_config({"model": "any", "data": "any", "output": "any"})).plan
    return described(setting_of(torch.device(plan.device), DTYPES[plan.compute]))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _declared() -> tuple[list[str], list[str]]:
    """The extras that snugtune declares, and all it requires; nothing where it runs without having been installed."""
    try:
        declared = importlib.metadata.metadata("snugtune")
    except importlib.metadata.PackageNotFoundError:
        return [], []
    return declared.get_all("Provides-Extra") or [], declared.get_all("Requires-Dist") or []


def extras(names: Sequence[str], requirements: Sequence[str]) -> tuple[Extra, ...]:
    """What each extra lacks here, by the requirements in a package's metadata (PEP 508)."""
    parsed = [Requirement(line) for line in requirements]
    found = []
    for name in names:
        missing = tuple(sorted({r.name for r in _needed(parsed, name) if not _satisfied(r)}))
        found.append(Extra(name, not missing, missing, f"pip install 'snugtune[{name}]'" if missing else None))
    return tuple(found)


def _needed(parsed: Sequence[Requirement], extra: str) -> list[Requirement]:
    """The other packages of an extra; one extra may name another as `snugtune[other]`."""
    needed: list[Requirement] = []
    for requirement in parsed:
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}):  # needed always
            continue
        if requirement.name == "snugtune":
            needed += [r for other in requirement.extras for r in _needed(parsed, other)]
        else:
            needed.append(requirement)
    return needed


def _satisfied(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def to_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2)


def run_doctor(console: Console, as_json: bool = False, quick: bool = False) -> None:
    """Print the report to stdout: tables for people, one JSON object for scripts."""
    if as_json:
        console.raw(to_json(examine(quick)) + "\n")
        return
    if not quick:
        console.note("multiplying matrices in every number format; a few seconds")
    begun = time.monotonic()
    report = examine(quick)
    console.table(_facts(report))
    if report.formats:
        console.say()
        console.table(_formats(report))
        console.note(f"took {time.monotonic() - begun:.0f} s")


def run_precision(config: RunConfig, console: Console, as_json: bool = False) -> None:
    """Print which numbers of a run would be in which format. Loads nothing but the model's config. Raises `InputError`."""
    source = find_model(config.model, console.note)
    plan = make_plan(config, stored_width(source, load_config(source, config.trust_remote_code))).plan
    rows = precision(config, plan)
    if as_json:
        console.raw(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("", "numbers", "kept in", "computed in"):
        table.add_column(name, overflow="fold")
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    scopes = [row.scope for row in rows]
    for index, row in enumerate(rows):
        first = index == 0 or scopes[index - 1] != row.scope
        bits = "" if row.bits is None else f"{row.bits:.3g}"
        table.add_row(row.scope if first else "", row.what, row.kept, row.computed, bits, row.note)
    console.out.print(table)


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in _sections(report).items():
        for index, line in enumerate(lines):
            table.add_row(name if index == 0 else "", Text(line))
    return table


def _sections(report: Report) -> dict[str, list[str]]:
    """Heading -> lines, for people."""
    cpu, ram = report.processor, report.memory
    limit = [] if ram.limit is None else [f"{gib(ram.limit)} limit of the container, {gib(ram.limit_free or 0)} of it free"]
    return {
        "versions": [", ".join(f"{name} {version or '(missing)'}" for name, version in report.versions.items())],
        "extras": [
            f"{e.name}: installed" if e.installed else f"{e.name}: lacks {', '.join(e.missing)}; {e.install}"
            for e in report.extras
        ],
        "platform": [report.platform],
        "CPU": [
            f"{cpu.model}, {cpu.usable} of {cpu.cores} cores usable",
            f"{', '.join(cpu.features) or 'no special features'} (torch uses {cpu.capability})",
        ],
        "GPU": [f"{g.name}, capability {g.capability}, {gib(g.free)} of {gib(g.total)} free" for g in report.gpus]
        or ["no CUDA device"],
        "memory": [f"{gib(ram.available)} of {gib(ram.total)} free", *limit],
        "folders": [_folder(f) for f in report.folders],
        "threads": _threads(report.threads, cpu),
        "allocator": _allocator(report.allocator),
        "auto": list(report.auto.reasons),
        "kernels": [f"{part.replace('_', ' ')}: {kernel}" for part, kernel in report.kernels.items()],
    }


def _threads(found: machine.Threads, cpu: machine.Processor) -> list[str]:
    """What a run computes on, and a container that allows less."""
    settings = {"OMP_NUM_THREADS": found.omp_num_threads, "MKL_NUM_THREADS": found.mkl_num_threads}
    lines = [
        f"a run computes on {found.torch} of {cpu.usable} usable cores (inter-op {found.interop})",
        _settings(settings),
    ]
    if found.cpu_quota is not None and found.cpu_quota < found.torch:
        advice = f"OMP_NUM_THREADS={max(1, int(found.cpu_quota))} would keep threads from waiting for one another"
        lines.append(f"the container allows {found.cpu_quota:g} cores' worth of time: {advice}")
    return lines


def _allocator(found: machine.Allocator) -> list[str]:
    """Which malloc, and what is kept of compiled products."""
    settings = {"LD_PRELOAD": found.ld_preload, "MALLOC_ARENA_MAX": found.malloc_arena_max}
    arenas = "" if found.arenas is None else f", at most {found.arenas} arenas"
    caches: dict[str, str | None] = dict(zip(machine.KERNEL_CACHES, found.kernels, strict=True))
    return [
        f"{found.name}{arenas}; {_settings(settings)}",
        f"a run keeps {machine.KERNELS} compiled products for each job in a forward, unless set; {_settings(caches)}",
    ]


def _folder(found: machine.Folder) -> str:
    if "/" in found.name:  # a part of the folder before it, on the same disk
        return f"  {found.path}: {gib(found.used or 0)} of that"
    return f"{found.name} {found.path}: {gib(found.free)} free" + (f", {gib(found.used)} used" if found.used is not None else "")


def _settings(values: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {'not set' if value is None else value}" for name, value in values.items())


def _formats(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("device", "format"):
        table.add_column(name, no_wrap=True)
    for name in ("GFLOP/s", "size", "rel. error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for f in report.formats:
        chosen = f.device == report.auto.device and f.name == report.auto.weights
        facts = (f"{f.gflops:.1f}", str(f.size), f"{f.error:.1e}") if f.runs else ("-", "-", "-")
        table.add_row(f.device, f.name, *facts, Text("<- auto" if chosen else f.reason or ""))
    return table
