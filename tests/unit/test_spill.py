"""Block inputs put away between forward and backward: the same bits, out of memory, and a disk that fails stops the step."""

import errno
import json
import os
import resource
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import NoWatch, lora_gradients, nll_packed, packed, sequences, shake, tiny_base
from quantised import saved
from snugtune.config import JobConfig, to_config
from snugtune.errors import InputError, StorageError, UnreadableError
from snugtune.files import lies_in_memory
from snugtune.memory.plan import make_plan
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.model.base import Base
from snugtune.model.spill import WRITES_AHEAD, Disk, OnDisk, Spill
from snugtune.observer import Silent
from snugtune.run import train
from snugtune.training.evaluation import evaluate
from snugtune.training.examples import JobData
from snugtune.training.job import Job, start_job
from snugtune.training.metrics import StepMetrics
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Offload, Plan


@pytest.fixture(autouse=True)
def _small_ones_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's states count as well, and the test's folder as a disk, whatever it lies on."""
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("snugtune.model.spill.SMALLEST", 1)
    monkeypatch.setattr("snugtune.model.spill.lies_in_memory", lambda folder: False)


@dataclass(frozen=True)
class Put:
    """That something was put on a disk."""

    disk: Disk
    nbytes: int
    dtype: torch.dtype


@pytest.fixture
def put_away(monkeypatch: pytest.MonkeyPatch) -> list[Put]:
    """What was put on disk so far."""
    seen: list[Put] = []
    original = Disk.put

    def put(self: Disk, tensor: Tensor) -> OnDisk:
        seen.append(Put(self, tensor.nbytes, tensor.dtype))
        return original(self, tensor)

    monkeypatch.setattr(Disk, "put", put)
    return seen


def chunks_for(base: Base) -> list[list[Tensor]]:
    """Two forwards of one step; a model that cannot pack takes a sequence in each."""
    parts = sequences(9, 14, 11)
    return [parts[:2], parts[2:]] if base.packable else [[p] for p in parts]


def gradients(arch: str, spill: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    base = tiny_base(arch, dtype)
    attached = Lora().attach(base, "job", LoraConfig(r=4, lora_dropout=0.2), seed=0)
    shake(attached)
    base.configure(recompute=True, head_rows=512, spill=spill)
    base.model.train()
    for index, parts in enumerate(chunks_for(base)):
        with base.routed(packed(parts, "job", seed=index)):
            nll_packed(base, parts, "job").backward()
    return lora_gradients(attached)


@pytest.mark.parametrize(
    "arch", ["llama", "gemma2", "gemma3n", "gpt2", "gptoss", "mixtral", "modernbert", "bloom", "mamba2", "zamba2", "longrope"]
)
def test_gradients_are_those_of_recompute(arch: str, put_away: list[Put]) -> None:
    """With LoRA's dropout, over several chunks, in models that share rows and in those that do not."""
    ours, truth = gradients(arch, spill=True), gradients(arch, spill=False)
    assert all(torch.equal(ours[k], truth[k]) for k in truth) and any(g.any() for g in truth.values())
    base = tiny_base(arch)
    assert len(put_away) >= len(chunks_for(base)) * base.model.config.num_hidden_layers


def test_gradients_in_half_precision_are_those_of_recompute(put_away: list[Put]) -> None:
    ours, truth = (gradients("llama", spill, torch.bfloat16) for spill in (True, False))
    assert all(torch.equal(ours[k], truth[k]) for k in truth)
    assert {put.dtype for put in put_away} == {torch.bfloat16}


@pytest.mark.parametrize("spill", [True, False])
def test_block_inputs_do_not_live_between_forward_and_backward(spill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the spill all do: the count can see them."""
    places: list[Disk] = []
    original = Disk.__init__
    monkeypatch.setattr(Disk, "__init__", lambda self, folder: (original(self, folder), places.append(self))[0])
    base = tiny_base("llama", num_hidden_layers=4)
    attached = Lora().attach(base, "job", LoraConfig(r=4), seed=0)
    base.configure(recompute=True, head_rows=512, spill=spill)
    base.model.train()
    inputs: list[weakref.ref[Tensor]] = []
    for name, module in base.model.named_modules():
        if name.startswith("model.layers.") and name.count(".") == 2:
            module.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    parts = sequences(20)
    with base.routed(packed(parts, "job")):
        loss = nll_packed(base, parts, "job")
        for place in places:
            place.worker.submit(lambda: None).result()  # all before it is written
        assert len(inputs) == 4
        assert sum(ref() is not None for ref in inputs) == (0 if spill else 4)
        loss.backward()
    assert attached.flat.grad is not None and attached.flat.grad.any()


def trainer(offload: Offload, dtype: torch.dtype = torch.float32, arch: str = "llama", **fields: Any) -> tuple[Trainer, Job]:
    """A job of three chunks a step, its base recomputing its blocks."""
    base = tiny_base(arch, dtype)
    plan = Plan("cpu", "fp32", 1, "blocks", 512, 1, "fp32", offload=offload)
    examples = tuple(
        Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x") for ids in sequences(9, 14, 11, 13)
    )
    plain = {"data": "x.jsonl", "batch_size": 3, "steps": 4, "max_seq_len": 16, "optimizer": {"lr": 1e-2}}
    data = JobData(examples[:3], examples[3:])
    made = Trainer(base, plan, NoWatch())
    made.add(start_job(base, JobConfig.model_validate(plain | fields), data, plan))
    return made, made.jobs["default"]


def state(job: Job) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in job.state()[0].items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


METHODS = {"lora": {"method": {"type": "lora", "lora_dropout": 0.1}}, "full": {"method": "full"}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_that_of_recompute(method: str, dtype: torch.dtype, put_away: list[Put]) -> None:
    """Through optimizer steps, evaluations between them, and with noise on the embeddings."""
    runs = [trainer(offload, dtype, **METHODS[method], neftune_noise_alpha=5) for offload in ("activations", "none")]
    for _ in range(3):
        losses = [[m.loss for m in run.step()] for run, _ in runs]
        held_out = [evaluate(run, job) for run, job in runs]
        assert losses[0] == losses[1] and held_out[0] == held_out[1]
    assert equal(*(state(job) for _, job in runs))
    assert len(put_away) == 3 * 3 * 2  # steps, chunks, blocks: nothing of the evaluations


def test_the_room_is_used_again(put_away: list[Put], tmp_path: Path) -> None:
    """And the file has no name that could stay behind."""
    run, _ = trainer("activations")
    for _ in range(4):
        run.step()
    largest = max(put.nbytes for put in put_away)
    size = os.fstat(put_away[0].disk.file.fileno()).st_size
    assert 0 < size <= 2 * largest
    assert list((tmp_path / "cache").iterdir()) == []


def test_small_tensors_stay(put_away: list[Put], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snugtune.model.spill.SMALLEST", 1 << 15)
    gradients("llama", spill=True)
    assert put_away == []


# --- the file ---------------------------------------------------------------------------------------------------------


def blocks(spill: Spill, x: Tensor, count: int = 3) -> Tensor:
    for _ in range(count):
        x = spill.checkpoint(torch.tanh, x * 2.0)
    return x


def test_what_comes_next_is_fetched_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 7, requires_grad=True)
    waiting: list[OnDisk] = []
    put, tensor = Disk.put, OnDisk.tensor
    monkeypatch.setattr(Disk, "put", lambda self, value: (waiting.append(put(self, value)), waiting[-1])[1])
    y = blocks(Spill(Disk(tmp_path)), x)
    assert len(waiting) == 3
    ahead: list[bool] = []

    def brought(self: OnDisk) -> Tensor:
        index = waiting.index(self)
        ahead.append(index == 0 or waiting[index - 1].reading is not None)
        return tensor(self)

    monkeypatch.setattr(OnDisk, "tensor", brought)
    y.sum().backward()
    truth = x.detach().clone().requires_grad_()
    torch.tanh(torch.tanh(torch.tanh(truth * 2.0) * 2.0) * 2.0).sum().backward()
    assert x.grad is not None and truth.grad is not None and torch.equal(x.grad, truth.grad)
    assert ahead == [True, True, True]


def test_a_slow_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what waits to be written would fill the memory that it is to leave."""
    go, original, done = threading.Event(), Disk.write, []

    def slow(self: Disk, tensor: Tensor, version: int, at: int) -> None:
        go.wait(10)
        original(self, tensor, version, at)

    monkeypatch.setattr(Disk, "write", slow)
    disk, values = Disk(tmp_path), [torch.randn(100) for _ in range(6)]
    forward = threading.Thread(target=lambda: [done.append(disk.put(v)) for v in values])
    forward.start()
    forward.join(0.2)
    assert forward.is_alive() and len(done) == WRITES_AHEAD
    go.set()
    forward.join(10)
    assert all(torch.equal(kept.tensor(), value) for kept, value in zip(done, values, strict=True))


def test_short_writes_and_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda file, data, at: preadv(file, [data[0][:700]], at))
    disk, values = Disk(tmp_path), [torch.randn(1234).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    kept = [disk.put(value) for value in values]
    assert all(torch.equal(k.tensor(), v) and k.tensor().dtype == v.dtype for k, v in zip(kept, values, strict=True))


def test_an_input_that_is_changed_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, original = threading.Event(), Disk.write
    monkeypatch.setattr(Disk, "write", lambda self, *args: (go.wait(10), original(self, *args))[1])
    value = torch.randn(100)
    kept = Disk(tmp_path).put(value)
    value.add_(1.0)
    go.set()
    with pytest.raises(RuntimeError, match="in place"):
        kept.tensor()


# --- disks that fail --------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files end at `size` bytes, as far as this process can write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def broken_reads(_: int) -> Iterator[None]:
    """A sector that cannot be read."""

    def preadv(file: int, data: Sequence[Any], at: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        yield


@contextmanager
def lost_writes(_: int) -> Iterator[None]:
    """A disk that says yes and keeps nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda file, data, at: len(data))
        yield


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (full_disk, "cannot be written in .*: file too large"),
        (broken_reads, "cannot be read back in .*: input/output error"),
        (lost_writes, "cannot be read back in .*: the file ends too early"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_failing_disk_stops_the_step(fault: Any, words: str, method: str) -> None:
    """The step did not happen: when the disk is back, training goes on as if nothing had been."""
    run, job = trainer("activations", **METHODS[method])
    truth, true_job = trainer("none", **METHODS[method])
    if fault is not lost_writes:  # of that a file which has been that long already shows nothing
        run.step()
        truth.step()
    before, at = state(job), job.step
    with fault(100), pytest.raises(StorageError, match=f"plan.offload: activations {words}") as stopped:
        run.step()
    assert "\n" not in str(stopped.value) and "SNUGTUNE_CACHE" in str(stopped.value)
    assert equal(state(job), before) and job.step == at
    del stopped
    for _ in range(2):
        assert [m.loss for m in run.step()] == [m.loss for m in truth.step()]
    assert equal(state(job), state(true_job))


def test_a_place_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snugtune.model.spill.lies_in_memory", lambda folder: True)
    with pytest.raises(StorageError, match=r"lies in memory itself \(tmpfs\); set SNUGTUNE_CACHE"):
        trainer("activations")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="cannot make the folder"):
        trainer("activations")


def test_which_folders_lie_in_memory(tmp_path: Path) -> None:
    """By the innermost mount; names with spaces are written in octal there (proc(5))."""
    (tmp_path / "with space" / "disk").mkdir(parents=True)
    root = str(tmp_path.resolve())
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/vda / ext4 rw 0 0\ntmpfs {root}/with\\040space tmpfs rw 0 0\n/dev/vdb {root}/with\\040space/disk ext4 rw 0 0\n"
    )
    assert not lies_in_memory(tmp_path, mounts)
    assert lies_in_memory(tmp_path / "with space", mounts) and lies_in_memory(tmp_path / "with space" / "made later", mounts)
    assert not lies_in_memory(tmp_path / "with space" / "disk" / "deep", mounts)
    assert not lies_in_memory(tmp_path, tmp_path / "none")


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_recomputes_with_it() -> None:
    config = {"model": "demo", "data": "x.jsonl", "output": "o", "device": "cpu", "plan": {"offload": "activations"}}
    planned = make_plan(to_config(config))
    assert (planned.plan.offload, planned.plan.recompute) == ("activations", "blocks")
    assert "the blocks' inputs wait on disk" in planned.reasons
    with pytest.raises(InputError, match=r"needs plan\.recompute: blocks"):
        make_plan(to_config(config | {"plan": {"offload": "activations", "recompute": "none"}}))


def test_models_with_a_way_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code of transformers' old kind takes no function to recompute with."""
    base = tiny_base()

    def old_kind(module: nn.Module, value: bool = False) -> None: ...

    monkeypatch.setattr(base.model, "_set_gradient_checkpointing", old_kind)
    with pytest.raises(InputError, match=r"plan\.offload: 'tiny-llama' .* set it to none"):
        base.configure(recompute=True, head_rows=512, spill=True)


class DiskBreaks(Silent):
    """The disk can no longer be read after the first step, until `mended`."""

    def __init__(self) -> None:
        self.mended = ExitStack()

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == 1 and metrics.grad_norm is not None:
            self.mended.enter_context(broken_reads(0))


def test_a_run_goes_on_from_the_step_that_a_disk_failed_in(tmp_path: Path) -> None:
    folder, data = saved(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {i}?", "completion": f"It is {i}."}) + "\n" for i in range(6)))
    fields = {"model": str(folder), "data": str(data), "steps": 3, "batch_size": 2, "max_seq_len": 64, "checkpoint_every": 3}
    plan = {"weights": "fp32", "offload": "activations"}
    truth = train(to_config({**fields, "output": str(tmp_path / "truth"), "plan": plan}))
    config, disk = to_config({**fields, "output": str(tmp_path / "run"), "plan": plan}), DiskBreaks()
    with disk.mended, pytest.raises(UnreadableError, match="; state saved at step 1, the same command goes on"):
        train(config, disk)
    result = train(config)
    assert [m["loss"] for m in result.metrics] == [m["loss"] for m in truth.metrics]
    ours, theirs = (load_file(r.artefacts["default"] / "adapter_model.safetensors") for r in (result, truth))
    assert equal(ours, theirs)
