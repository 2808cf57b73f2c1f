"""Weights that stay on disk: the same bits as in memory, in two buffers, read once; a disk that fails costs no step.

The truth is the resident run. Models have more blocks than there are buffers, so that every pass reads.
"""

import errno
import functools
import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import lora_gradients, packed, sequences, shake, tiny_base, tiny_model, tiny_tokenizer
from snugtune.config import to_config
from snugtune.errors import Interrupted, StorageError, UnreadableError
from snugtune.files import claimed
from snugtune.methods.lora import Lora, LoraConfig
from snugtune.model.base import Base, load_base
from snugtune.model.blockfile import ABOUT, DATA, Writer
from snugtune.model.formats import Bits4
from snugtune.model.generate import Sampling, generate
from snugtune.model.load import load_config, load_frozen
from snugtune.model.offload import SOURCES
from snugtune.model.source import ModelSource
from snugtune.model.stream import FileSource, ReadInto, Stream, StreamedLinear
from snugtune.observer import Silent
from snugtune.run import train
from snugtune.types import Plan

DEPTH: dict[str, dict[str, Any]] = {"gpt2": {"n_layer": 5}, "gemma2": {"num_hidden_layers": 5, "tie_word_embeddings": True}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder_of(arch: str, place: Path) -> Path:
    made = _made(arch)
    for name, content in made.items():
        (place / arch).mkdir(parents=True, exist_ok=True)
        (place / arch / name).write_bytes(content)
    return place / arch


@functools.cache
def _made(arch: str) -> dict[str, bytes]:
    """The files of a tiny model and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(arch, **DEPTH.get(arch, {"num_hidden_layers": 5})).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def plan_of(offload: str, weights: str, **more: Any) -> Plan:
    compute = "bf16" if weights == "bf16" else "fp32"
    return Plan("cpu", weights, 1, "blocks", 64, 1, compute, offload=offload, **more)  # pyright: ignore[reportArgumentType]


def load(folder: Path, offload: str = "weights", weights: str = "fp32", say: Callable[[str], None] = print, **more: Any) -> Base:
    return load_base(ModelSource("tiny", str(folder)), plan_of(offload, weights, **more), say=say)


def keep(folder: Path, weights: str = "fp32", say: Callable[[str], None] = print, **more: Any) -> None:
    """Only have the weights written to disk, where they are not."""
    source = ModelSource("tiny", str(folder))
    load_frozen(source, load_config(source, False), plan_of("weights", weights, **more), False, say)


def stream_of(base: Base) -> Stream:
    return next(m for m in base.model.modules() if isinstance(m, StreamedLinear)).stream


def with_reader(stream: Stream, wrap: Callable[[ReadInto], ReadInto]) -> None:
    """Let the stream read its file through another reader."""
    file = stream.source
    assert isinstance(file, FileSource)
    stream.source = FileSource(file.name, file.index, wrap(file.read))


def failing_at(k: int) -> Callable[[ReadInto], ReadInto]:
    """A disk whose k-th read, and no other, fails."""
    count = 0

    def wrap(read: ReadInto) -> ReadInto:
        def once(view: memoryview, offset: int) -> int:
            nonlocal count
            count += 1
            if count == k:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(view, offset)

        return once

    return wrap


def trained(base: Base, recompute: int) -> dict[str, Tensor]:
    """Gradients of two chunks, with dropout, and an eval pass between them."""
    base.configure(recompute, 64)
    attached = Lora().attach(base, "job", LoraConfig(r=4, lora_dropout=0.1), seed=0)
    shake(attached)
    for seed in (0, 1):
        batch = packed(sequences(12, 9, seed=seed) if base.packable else sequences(14, seed=seed), "job", seed)
        base.model.eval()
        with torch.no_grad(), base.routed(batch):
            base.hidden(batch)
        base.model.train()
        with base.routed(batch):
            base.hidden(batch).float().square().mean().backward()
    return lora_gradients(attached)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "weights", "more"),
    [
        ("llama", "fp32", {}),
        ("llama", "bf16", {}),
        ("llama", "int8", {}),
        ("llama", "int8", {"outlier_threshold": 3.0}),
        ("llama", "w8a8", {}),
        ("llama", "nf4", {}),
        ("llama", "nf4", {"double_quant": True}),
        ("gpt2", "fp32", {}),
        ("gpt2", "nf4", {}),
        ("gemma2", "bf16", {}),
        ("mixtral", "nf4", {}),
    ],
)
def test_streamed_gradients_are_those_of_the_resident_base(arch: str, weights: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(arch, tmp_path)
    resident = load(folder, "none", weights, **more)
    truth = trained(resident, recompute=True)
    for recompute in (1, 0, 2):  # encoded now, and found on disk
        base = load(folder, "weights", weights, **more)
        assert base.fingerprint == resident.fingerprint
        streamed = trained(base, recompute)
        assert len(stream_of(base).sizes) == 5
        assert streamed.keys() == truth.keys()
        for name, gradient in truth.items():
            assert torch.equal(streamed[name], gradient), name


def test_two_threads_change_nothing_of_that(tmp_path: Path) -> None:
    torch.set_num_threads(2)  # the fixture of all unit tests sets it back
    folder = folder_of("llama", tmp_path)
    truth, streamed = (trained(load(folder, offload, "bf16"), recompute=True) for offload in ("none", "weights"))
    assert all(torch.equal(streamed[name], gradient) for name, gradient in truth.items())


@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_in_nf4_is_streamed_as_it_is_stored(double: bool, tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    model = tiny_model("llama", num_hidden_layers=5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        parts = Bits4(double=double).encode(tensor)
        about: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(tensor.shape), "dtype": "float32"}
        if double:
            tensors |= {f"{name}.nested_absmax": parts["nested_absmax"], f"{name}.nested_quant_map": parts["nested_code"].clone()}
            about |= {"nested_blocksize": 256, "nested_offset": float(parts["offset"]), "nested_dtype": "float32"}
        tensors |= {name: parts["packed"][:, None], f"{name}.absmax": parts["absmax"]}
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    truth, streamed, again = (trained(load(folder, offload, "nf4"), True) for offload in ("none", "weights", "weights"))
    assert all(torch.equal(streamed[name], gradient) for name, gradient in truth.items())
    assert all(torch.equal(again[name], gradient) for name, gradient in truth.items())


def test_answers_are_those_of_the_resident_base(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    prompts, how = [[5, 6, 7], [8, 9]], Sampling(max_new_tokens=6)
    resident, streamed = (generate(load(folder, offload), None, prompts, [2], how) for offload in ("none", "weights"))
    assert streamed == resident


def test_a_weight_that_is_held_on_to_stays_what_it_is(tmp_path: Path) -> None:
    base = load(folder_of("llama", tmp_path))
    base.freeze()
    layers = [m for m in base.model.modules() if isinstance(m, StreamedLinear)]
    held = [layer.weight for layer in layers]
    assert len(layers) == 35
    for name, layer, weight in zip(dict(base.model.named_modules()), layers, held, strict=False):
        assert torch.equal(layer.weight, weight), name


def test_experts_that_are_no_linears_stay_and_it_is_said(tmp_path: Path) -> None:
    base = load(folder_of("mixtral", tmp_path))
    assert any(note.startswith("its fused experts stay in memory: ") for note in base.notes)
    assert not any("experts" in name for name, m in base.model.named_modules() if isinstance(m, StreamedLinear))


# --- two buffers, and no read too many --------------------------------------------------------------------------------


class Shelf:
    """A source in memory that writes down what was asked of it. Nothing arrives before it is waited for."""

    def __init__(self, blocks: int):
        self.blocks, self.started, self.buffers = blocks, [], []

    def buffer(self, size: int) -> Tensor:
        self.buffers.append(torch.zeros(size, dtype=torch.uint8))
        return self.buffers[-1]

    def start(self, block: int, buffer: Tensor) -> Callable[[], object]:
        self.started.append(block)
        return lambda: buffer.fill_(block)


def walk(stream: Stream, way: Sequence[int], returns: bool) -> None:
    for block in way:
        for _ in range(3):  # a block has several linears
            assert stream.fetch(block, returns).eq(block).all()


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_training_reads_each_block_once_a_way_and_turns_round(blocks: int) -> None:
    shelf = Shelf(blocks)
    stream = Stream(shelf, [8] * blocks)
    up, down = list(range(blocks)), list(range(blocks))[::-1]
    walk(stream, up, returns=True)
    assert shelf.started == up
    shelf.started.clear()
    for way in (down, up, down):
        walk(stream, way, returns=True)
        assert shelf.started == way[2:], "the two at hand are not read again"
        shelf.started.clear()
    assert len(shelf.buffers) == min(2, blocks)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_evaluation_begins_anew_and_has_the_first_block_fetched_meanwhile(blocks: int) -> None:
    shelf = Shelf(blocks)
    stream = Stream(shelf, [8] * blocks)
    for _ in range(3):
        walk(stream, range(blocks), returns=False)
    assert shelf.started == ([*range(blocks)] * 3 + [0] if blocks > 2 else [*range(blocks)])


def test_any_order_gives_the_right_bytes() -> None:
    draw, shelf = random.Random(0), Shelf(5)
    stream = Stream(shelf, [8, 16, 8, 24, 8])
    for _ in range(500):
        walk(stream, [draw.randrange(5)], returns=draw.random() < 0.5)
    assert [len(b) for b in shelf.buffers] == [24, 24]


# --- the file ---------------------------------------------------------------------------------------------------------


def logits(base: Base) -> Tensor:
    with torch.no_grad(), base.answering(None):
        return base.model(input_ids=sequences(9)[0][None]).logits


def test_a_second_start_does_not_read_the_weights_again(tmp_path: Path) -> None:
    """What the blocks' weights are in the checkpoint no longer matters: they are overwritten, behind the file's back."""
    folder, said = folder_of("llama", tmp_path), []
    first = load(folder, weights="nf4", say=said.append)
    file = folder / "model.safetensors"
    before, stat = load_file(file), file.stat()
    save_file({n: t if "_proj" not in n else t.fill_(float("nan")) for n, t in before.items()}, file, {"format": "pt"})
    assert file.stat().st_size == stat.st_size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load(folder, weights="nf4", say=said.append)
    assert len(said) == 1
    assert said[0].startswith("writing the blocks' weights to ")
    assert torch.equal(logits(first), logits(second))
    assert first.fingerprint == second.fingerprint


def only_file(cache: Path) -> Path:
    (file,) = cache.rglob(DATA)
    return file


def test_another_checkpoint_or_format_has_a_file_of_its_own(tmp_path: Path, cache: Path) -> None:
    folder = folder_of("llama", tmp_path)
    keep(folder, weights="nf4")
    keep(folder, weights="nf4", double_quant=True)
    keep(folder, weights="fp32")
    keep(folder_of("llama", tmp_path / "elsewhere"), weights="fp32")
    assert len(list(cache.rglob(DATA))) == 4


def changed(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def all_gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("happened", [changed, gone, all_gone])
def test_what_was_made_of_files_that_are_no_more_is_removed(
    happened: Callable[[Path], None], tmp_path: Path, cache: Path
) -> None:
    """Once there is something new to write of a model of that name; and nothing else is."""
    folder, namesake, other = folder_of("llama", tmp_path), folder_of("llama", tmp_path / "b"), folder_of("gpt2", tmp_path)
    keep(folder)
    keep(folder, weights="nf4")
    old = set(cache.rglob(DATA))
    keep(namesake)
    keep(other)
    kept = set(cache.rglob(DATA)) - old
    assert (len(old), len(kept)) == (2, 2)
    size = sum(file.stat().st_size for path in old for file in path.parent.iterdir())
    happened(folder)
    said: list[str] = []
    keep(namesake, say=said.append)  # nothing is written
    assert not said
    keep(namesake, weights="nf4", say=said.append)
    found = set(cache.rglob(DATA))
    assert kept < found and not old & found
    assert len(found) == 3 == len(list((cache / "streamed").iterdir()))
    assert said[0] == f"removed what was kept in {cache / 'streamed'} of earlier files of llama ({size / 2**20:.1f} MiB)"
    assert len(said) == 2


def test_what_somebody_writes_or_nobody_knows_is_not_removed(tmp_path: Path, cache: Path) -> None:
    folder = folder_of("llama", tmp_path)
    keep(folder)
    keep(folder, weights="nf4")
    held, unknown = sorted(path.parent.parent for path in cache.rglob(DATA))
    (unknown / "blocks" / SOURCES).write_text("[1]")
    changed(folder)
    with claimed(held):
        keep(folder, weights="int8")
    assert (held / "blocks" / DATA).exists() and (unknown / "blocks" / DATA).exists()
    (held / "blocks").rename(held / ".part-blocks-x")  # what a killed process leaves
    keep(folder, weights="bf16")
    assert not list(held.iterdir()) and (unknown / "blocks" / DATA).exists()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4096)


def empty_about(file: Path) -> None:
    (file.parent / ABOUT).write_text("{")


def lie(file: Path) -> None:
    """Parts beyond the file's end, in words that are in order."""
    about = file.parent / ABOUT
    found = json.loads(about.read_text())
    found["about"]["runs"][1][0][0] += 1 << 30
    about.write_text(json.dumps(found))


@pytest.mark.parametrize("damage", [cut, empty_about, lie])
def test_a_damaged_file_is_made_again(damage: Callable[[Path], None], tmp_path: Path, cache: Path) -> None:
    folder, said = folder_of("llama", tmp_path), []
    truth = logits(load(folder))
    damage(only_file(cache))
    assert torch.equal(logits(load(folder, say=said.append)), truth)
    assert len(said) == 1
    assert torch.equal(logits(load(folder, say=said.append)), truth)
    assert len(said) == 1


def test_a_changed_byte_is_seen_and_named(tmp_path: Path, cache: Path) -> None:
    folder = folder_of("llama", tmp_path)
    load(folder)
    with only_file(cache).open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(StorageError, match=rf"{DATA}: block 4 is not what was written \(checksum\); delete .*blocks"):
        load(folder)


def test_an_interrupted_load_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    folder = folder_of("llama", tmp_path)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(folder, say=interrupt)
    assert not [p for p in cache.rglob("*") if p.is_file()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_ctrl_c_stops_the_writing_at_once(
    number: signal.Signals, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = to_config(fields(tmp_path, folder_of("llama", tmp_path), "run", "weights"))
    add, count = Writer.add, 0

    def pressed(writer: Writer, *what: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            signal.raise_signal(number)
        add(writer, *what)

    monkeypatch.setattr(Writer, "add", pressed)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="interrupted before training; nothing is lost"):
        train(config)
    assert count == 5
    assert signal.getsignal(number) is before
    assert not [p for p in (cache / "streamed").rglob("*") if p.is_file()]
    assert not (tmp_path / "run").exists()


# --- a disk that fails ------------------------------------------------------------------------------------------------


def test_a_failed_read_is_one_line_and_the_next_one_may_succeed(tmp_path: Path) -> None:
    base = load(folder_of("llama", tmp_path))
    truth, stream = logits(base), stream_of(base)
    with_reader(stream, failing_at(3))
    with pytest.raises(UnreadableError, match=rf"{DATA}: cannot be read: input/output error"):
        logits(base), logits(base)
    assert torch.equal(logits(base), truth)
    with_reader(stream, lambda read: lambda view, offset: read(view[:7], offset))  # a disk that gives a little at a time
    assert torch.equal(logits(base), truth)
    with_reader(stream, lambda read: lambda view, offset: 0)
    with pytest.raises(UnreadableError, match="ends early"):
        logits(base)


class BadDisk(Silent):
    """Lets the k-th read since training began fail. `reads`: how many there were."""

    def __init__(self, k: int = 0):
        self.k, self.reads = k, 0

    def begin(self, jobs: Sequence[Any]) -> None:
        fail = failing_at(self.k)

        def wrap(read: ReadInto) -> ReadInto:
            def counted(view: memoryview, offset: int) -> int:
                self.reads += 1
                return broken(view, offset)

            broken = fail(read)
            return counted

        with_reader(stream_of(jobs[0].attached.base), wrap)


def fields(place: Path, folder: Path, output: str, offload: str) -> dict[str, Any]:
    lines = [{"prompt": f"What is {i}?", "completion": f"It is {i}, or so."} for i in range(8)]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = {"prompts": ["What is 3?"], "every": 1, "max_new_tokens": 2}
    return {
        "model": str(folder), "data": str(place / "data.jsonl"), "output": str(place / output), "validation": 0.25,
        "max_seq_len": 64, "batch_size": 3, "steps": 2, "eval_every": 1, "checkpoint_every": 2, "keep_best": True,
        "samples": samples, "method": {"type": "lora", "r": 2, "lora_dropout": 0.1}, "optimizer": {"lr": 0.5},
        "plan": {"weights": "fp32", "offload": offload, "recompute": "blocks", "micro_batch": 1},
    }  # fmt: skip


EXACT = ("step", "loss", "tokens", "grad_norm", "eval_loss", "eval_tokens")


def test_a_run_goes_on_from_the_step_that_a_disk_failed_in(tmp_path: Path) -> None:
    """Wherever it fails: in training, evaluating, sampling; the end is that of the resident run, bit for bit.

    The learning rate is so high that the best step is not the last: which weights the last questions are asked of matters.
    """
    folder = folder_of("llama", tmp_path)
    truth = train(to_config(fields(tmp_path, folder, "truth", "none")))
    losses = [m["eval_loss"] for m in truth.metrics]
    assert min(losses[1:]) != losses[-1]
    healthy = BadDisk()
    train(to_config(fields(tmp_path, folder, "healthy", "weights")), healthy)
    assert healthy.reads > 60
    for k in (2, healthy.reads // 3, healthy.reads // 2, healthy.reads - 4):
        config = to_config(fields(tmp_path, folder, f"run-{k}", "weights"))
        with pytest.raises(UnreadableError, match=r"weights\.bin: .*; state saved at step \d, the same command goes on"):
            train(config, BadDisk(k))
        result = train(config)
        for ours, theirs in zip(result.metrics, truth.metrics, strict=True):
            assert [ours.get(key) for key in EXACT] == [theirs.get(key) for key in EXACT]
        assert result.samples == truth.samples
        ours, theirs = (load_file(r.artefacts["default"] / "adapter_model.safetensors") for r in (result, truth))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_weights_of_other_bases_are_not_streamed() -> None:
    assert not any(isinstance(m, StreamedLinear) for m in tiny_base().model.modules())
