"""Tokens are kept under what they follow from, whole or not at all, and found again."""

import inspect
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import byte_level

import snugtune.data.cache as cache_module
from snugtune import files
from snugtune.config import JobConfig
from snugtune.data.cache import TokenCache, tokenizer_identity
from snugtune.data.forms import Document, Item
from snugtune.data.sources import Drops
from snugtune.training.examples import read_job, tokenize_job
from snugtune.types import Example


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD", 3)


class Counting:
    """Tokenises by letters, counts what it was asked for and drops empty texts."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, items: Iterable[Item], drops: Drops) -> list[Example]:
        examples = []
        for item in items:
            assert isinstance(item, Document)
            self.seen.append(item.text)
            if not item.text:
                drops.add("empty", item.source)
                continue
            ids = torch.tensor([ord(c) for c in item.text])
            examples.append(Example(ids, torch.full((len(ids),), item.weight), item.source))
        return examples


def documents(*texts: str, weight: float = 1.0) -> list[Item]:
    return [Document(text, f"d:{number}", weight) for number, text in enumerate(texts, 1)]


def ask(folder: Path, items: Sequence[Item], settings: tuple[object, ...] = ("a",)) -> tuple[list[Example], Drops, list[str]]:
    drops, counting = Drops(), Counting()
    return TokenCache(folder, settings).tokenised(items, items, counting, drops), drops, counting.seen


def same(a: Sequence[Example], b: Sequence[Example]) -> bool:
    def equal(x: Example, y: Example) -> bool:
        dtypes = x.tokens.dtype == y.tokens.dtype and x.weights.dtype == y.weights.dtype
        return dtypes and torch.equal(x.tokens, y.tokens) and torch.equal(x.weights, y.weights) and x.source == y.source

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


TEXTS = ("one", "two", "", "three", "four", "", "five")


def test_the_second_time_nothing_is_tokenised_and_all_is_equal(tmp_path: Path) -> None:
    first, drops, seen = ask(tmp_path, documents(*TEXTS, weight=0.5))
    again, drops_again, seen_again = ask(tmp_path, documents(*TEXTS, weight=0.5))
    assert seen == list(TEXTS) and seen_again == []
    assert same(first, again)
    assert drops.lines() == drops_again.lines() == ["2 empty (d:3, d:6)"]


@pytest.mark.parametrize("change", ["text", "weight", "source", "settings", "order"])
def test_anything_that_tokens_follow_from_makes_them_anew(tmp_path: Path, change: str) -> None:
    ask(tmp_path, documents("one", "two"))
    items, settings = documents("one", "two"), ("a",)
    if change == "text":
        items = documents("one", "tvo")
    elif change == "weight":
        items = documents("one", "two", weight=2.0)
    elif change == "source":
        items = [Document("one", "e:1"), Document("two", "d:2")]
    elif change == "order":
        items = items[::-1]
    else:
        settings = ("b",)
    examples, _, seen = ask(tmp_path, items, settings)
    assert len(seen) == 2
    assert [e.source for e in examples] == [item.source for item in items]


def test_only_what_is_new_is_tokenised(tmp_path: Path) -> None:
    """What an interrupted process had done, or data that grew."""
    ask(tmp_path, documents(*"abcdef"))
    _, _, seen = ask(tmp_path, documents(*"abcdefgh"))
    assert seen == ["g", "h"]


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    first, _, _ = ask(tmp_path, documents("a", "b"))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    again, _, seen = ask(tmp_path, documents("a", "b"))
    assert seen == ["a", "b"] and same(first, again)
    assert ask(tmp_path, documents("a", "b"))[2] == []


@pytest.mark.parametrize("damage", ["no metadata", "lengths"])
def test_a_file_of_other_content_is_made_anew(tmp_path: Path, damage: str) -> None:
    first, _, _ = ask(tmp_path, documents("a", "b"))
    (file,) = tmp_path.iterdir()
    tensors = load_file(file)
    about = {"sources": '["d:1", "d:2"]', "drops": "[{}, {}]"}
    if damage == "lengths":
        tensors["lengths"] += 1
    save_file(tensors, file, None if damage == "no metadata" else about)
    again, _, seen = ask(tmp_path, documents("a", "b"))
    assert seen == ["a", "b"] and same(first, again)


def test_an_interrupted_process_leaves_what_it_had_done(tmp_path: Path) -> None:
    items = documents(*"abcdef")

    def tracked() -> Iterable[Item]:
        yield from items[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenCache(tmp_path, ("a",)).tokenised(items, tracked(), Counting(), Drops())
    assert ask(tmp_path, items)[2] == ["d", "e", "f"]


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache, counting = TokenCache(tmp_path / "file" / "tokens", ("a",)), Counting()
    examples = cache.tokenised(documents("a"), documents("a"), counting, Drops())
    assert len(examples) == 1
    assert cache.problem is not None and "not kept" in cache.problem


def test_a_cache_of_somebody_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose files' times cannot be set."""

    def refused(*_: object) -> None:
        raise PermissionError

    ask(tmp_path, documents("a"))
    monkeypatch.setattr(os, "utime", refused)
    assert ask(tmp_path, documents("a"))[2] == []


def test_what_nobody_asked_for_is_forgotten(tmp_path: Path) -> None:
    ask(tmp_path, documents("old"))
    ask(tmp_path, documents("kept"))
    now = time.time()
    for file in tmp_path.iterdir():
        os.utime(file, (now - files.UNUSED_SECONDS - 60,) * 2)
    ask(tmp_path, documents("kept"))  # asked for: young again
    ask(tmp_path, documents("new"))
    assert ask(tmp_path, documents("kept"))[2] == []
    assert ask(tmp_path, documents("old"))[2] == ["old"]


def test_a_tokenizer_is_known_by_what_it_does() -> None:
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    plain, same_again = byte_level(template), byte_level(template)
    assert tokenizer_identity(plain) == tokenizer_identity(same_again)
    assert tokenizer_identity(plain) != tokenizer_identity(byte_level(template + " "))
    same_again.add_tokens("<new>")
    assert tokenizer_identity(plain) != tokenizer_identity(same_again)
    assert tokenizer_identity(plain) != tokenizer_identity(byte_level(template, eos="<eos>"))
    before = tokenizer_identity(plain)
    plain.split_special_tokens = True
    assert tokenizer_identity(plain) != before


def test_another_objectives_code_makes_tokens_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is part of what tokens follow from; here of the objective, which stands apart from the data's."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    job = JobConfig.model_validate({"name": "a", "data": str(tmp_path / "a.jsonl"), "objective": {"type": "clm"}})

    def files_after() -> int:
        tokenize_job(job, read_job(job), byte_level(""), lambda items, _: items, lambda _: None)
        return len(list((tmp_path / "cache" / "tokens").iterdir()))

    assert [files_after(), files_after()] == [1, 1]
    other = tmp_path / "objectives" / "clm.py"
    other.parent.mkdir()
    other.write_text("# another way")
    monkeypatch.setattr(inspect, "getfile", lambda _: str(other))
    assert files_after() == 2


def test_code_is_known_by_all_that_stands_below_its_folder(tmp_path: Path) -> None:
    inner = tmp_path / "render" / "marks.py"
    inner.parent.mkdir()
    inner.write_text("# one way")
    before = files.code_of(tmp_path)
    assert files.code_of(tmp_path) == before
    inner.write_text("# another way")
    assert files.code_of(tmp_path) != before


def test_two_processes_at_once_end_with_whole_files(tmp_path: Path) -> None:
    """Both tokenise the same, write under the same names, and get what one alone would get."""
    context = multiprocessing.get_context("fork")
    together, results = context.Barrier(2), context.SimpleQueue()
    items = documents(*TEXTS)

    def tracked() -> Iterable[Item]:
        for item in items:
            together.wait(30)
            yield item

    def work() -> None:
        examples = TokenCache(tmp_path, ("a",)).tokenised(items, tracked(), Counting(), Drops())
        results.put([e.tokens.tolist() for e in examples])

    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    again, _, seen = ask(tmp_path, items)
    assert seen == [] and len(list(tmp_path.iterdir())) == 3, "a file a shard, and no leftovers"
    assert results.get() == results.get() == [e.tokens.tolist() for e in again]
