"""Writing that leaves the old or the new, never half of one: exceptions, a full disk, a kill at every file operation."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from snugtune.errors import InputError, StorageError
from snugtune.files import claimed, made_folder, remove_abandoned, remove_leftovers, scratch_folder, whole_folder, write_whole
from snugtune.training.metrics import MetricsFile, StepMetrics, read_metrics


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def in_a_process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `code` on its own, with `sys.argv[1:]` as given: for limits and kills that are not to hit the tests."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _begun(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """The same without waiting for its end."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _said(process: subprocess.Popen[str]) -> str:
    """Its next line."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Folders ---------------------------------------------------------------------------------------------------------------


def test_who_waits_for_a_folder_is_told_so_once(tmp_path: Path):
    said: list[str] = []
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with claimed(tmp_path):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    with claimed(tmp_path, waiting=lambda text: (said.append(text), done.set())):
        other.join(60)
    with claimed(tmp_path, waiting=said.append):  # nobody is there
        pass
    assert said == [f"another process is writing {tmp_path}; waiting for it"]
    assert not contents(tmp_path)


CLAIMS = """
    import sys
    from pathlib import Path
    from snugtune.files import claimed

    with claimed(Path(sys.argv[1])):
        print("mine", flush=True)
        sys.stdin.read()
"""


def test_who_holds_a_folder_is_told_until_it_is_killed(tmp_path: Path):
    with _begun(CLAIMS, tmp_path) as other:
        assert _said(other) == "mine"
        said = rf"^output: another process is training in {tmp_path} \(pid {other.pid}\); wait for it, or give a new folder$"
        with pytest.raises(InputError, match=said), claimed(tmp_path):
            pass
        (tmp_path / ".lock").write_text("")  # one that holds it since a moment ago
        with pytest.raises(InputError, match=f"training in {tmp_path}; wait"), claimed(tmp_path):
            pass
        other.kill()
    with claimed(tmp_path):
        assert contents(tmp_path) == {".lock": str(os.getpid())}
    assert not contents(tmp_path)


def test_a_folder_that_nothing_came_into_goes_again(tmp_path: Path):
    """With those above it that were made for it; what was there before stays, be it empty."""
    new = tmp_path / "there" / "deep" / "er"
    (tmp_path / "there").mkdir()
    with suppress(ZeroDivisionError), made_folder(new):
        assert new.is_dir()
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with made_folder(new):
        (new.parent / "x").touch()
    assert list(new.parent.iterdir()) == [new.parent / "x"]
    new.mkdir()
    with made_folder(new):
        pass
    assert new.is_dir()


def test_a_folder_appears_whole(tmp_path: Path):
    """Nowhere to be seen while it is filled, then complete, readable by others as any folder, and nothing beside it."""
    target = tmp_path / "deep" / "er" / "made"
    with whole_folder(target) as made:
        (made / "a").write_text("1")
        (made / "sub").mkdir()
        (made / "sub" / "b").write_text("2")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/er/made/a": "1", "deep/er/made/sub/b": "2"}
    assert os.listdir(target.parent) == ["made"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_folder_is_replaced_whole(tmp_path: Path):
    """Nothing of the old one shines through."""
    for text in ("old", "new"):
        with whole_folder(tmp_path / "made") as made:
            (made / text).write_text(text)
            (made / "both").write_text(text)
    assert contents(tmp_path) == {"made/new": "new", "made/both": "new"}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), OSError(28, "full"), OSError("odd")])
def test_an_exception_leaves_things_as_they_were(tmp_path: Path, error: BaseException, old: bool):
    """What the disk refuses becomes a StorageError; anything else, Ctrl-C too, stays what it is."""
    target = tmp_path / "made"
    if old:
        target.mkdir()
        (target / "a").write_text("old")
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)) as raised, whole_folder(target) as made:
        (made / "a").write_text("new")
        raise error
    assert contents(tmp_path) == ({"made/a": "old"} if old else {})
    assert os.listdir(tmp_path) == (["made"] if old else [])
    if isinstance(error, OSError):
        assert f"cannot write {target}" in str(raised.value)


@pytest.mark.parametrize("refused", [1, 2])
def test_a_refused_rename_leaves_the_old_folder_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int):
    """The last thing that can go wrong is a rename itself: the first or, where the old folder is put aside, the second."""
    target = tmp_path / "made"
    target.mkdir()
    (target / "a").write_text("old")

    renames, calls = {name: getattr(os, name) for name in ("rename", "replace")}, []

    def refusing(name: str):
        def rename(*arguments: object) -> None:
            calls.append(arguments)
            if len(calls) == refused:
                raise OSError(5, "Input/output error")
            renames[name](*arguments)

        return rename

    with suppress(StorageError), whole_folder(target) as made:
        (made / "a").write_text("new")
        for name in renames:
            monkeypatch.setattr(os, name, refusing(name))
    assert contents(tmp_path) in ({"made/a": "old"}, {"made/a": "new"})
    assert os.listdir(tmp_path) == ["made"]


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*made"), whole_folder(tmp_path / "file" / "made"):
        pytest.fail("nothing to fill")
    with pytest.raises(StorageError, match=r"cannot write .*made"):
        write_whole(tmp_path / "file" / "made", "x")
    assert contents(tmp_path) == {"file": "x"}


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import numpy
    from safetensors.numpy import save_file
    from snugtune.errors import StorageError
    from snugtune.files import whole_folder, write_whole

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    try:
        if kind == "text":
            write_whole(folder / "made", "new" * 100_000)
        else:
            with whole_folder(folder / "made") as made:
                (made / "small").write_text("new")
                if kind == "tensors":
                    save_file({"a": numpy.zeros(100_000)}, made / "big")
                else:
                    (made / "big").write_text("new" * 100_000)
    except StorageError as error:
        print(error)
        sys.exit(7)
"""


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("kind", ["folder", "tensors", "text"])
def test_a_full_disk_leaves_the_old(tmp_path: Path, kind: str, old: bool):
    """Played by a limit on file sizes: the write breaks off in the middle of a file, for plain files and for safetensors."""
    name = "made" if kind == "text" else "made/a"
    if old:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    done = in_a_process(FULL_DISK, tmp_path, kind)
    assert done.returncode == 7, done.stderr
    assert f"cannot write {tmp_path / 'made'}: " in done.stdout
    assert contents(tmp_path) == ({name: "old"} if old else {})
    assert os.listdir(tmp_path) == (["made"] if old else [])


KILLED = """
    import os, shutil, sys
    from pathlib import Path
    from snugtune.files import whole_folder, write_whole

    OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "tempfile.mkdtemp"}
    kind = sys.argv[1]

    def write(target):
        if kind == "text":
            write_whole(target, "new")
            return
        with whole_folder(target) as made:
            (made / "a").write_text("new")
            (made / "b").write_text("new")

    def killed_at(number, target):  # in a child process, which a kill ends before its number-th file operation
        child = os.fork()
        if child == 0:
            left = [number]
            def kill(event, arguments):
                if event in OPERATIONS:
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)
            sys.addaudithook(kill)
            write(target)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    number, killed = 0, True
    while killed:
        number += 1
        folder = Path(sys.argv[2]) / f"killed-at-{number:03d}"
        if kind == "text":
            folder.mkdir()
            (folder / "made").write_text("old")
        else:
            (folder / "made").mkdir(parents=True)
            (folder / "made" / "a").write_text("old")
            (folder / "made" / "b").write_text("old")
        killed = killed_at(number, folder / "made")
"""


@pytest.mark.parametrize("kind", ["text", "folder"])
def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new(tmp_path: Path, kind: str):
    """A checkpoint that replaces one of the same step must not cost both. What else lies about is swept up afterwards."""
    done = in_a_process(KILLED, kind, tmp_path)
    assert done.returncode == 0, done.stderr
    states = []
    for folder in sorted(tmp_path.iterdir()):
        remove_leftovers(folder)
        states.append(contents(folder))
    files = ("made",) if kind == "text" else ("made/a", "made/b")
    whole = [{name: text for name in files} for text in ("old", "new")]
    assert [state for state in states if state not in whole] == []
    assert states[0] == whole[0] and states[-1] == whole[1] and len(states) >= 3


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path):
    """What a kill left half-written goes, however deep; the run's own files stay, those with a dot too."""
    own = {"config.yaml", "adapters/a/x", "checkpoints/step-00000010/run.json", ".gitignore", ".cache/x", "a.part"}
    for name in own:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with whole_folder(tmp_path / "checkpoints" / "step-00000020") as made:
        (made / "half").write_text("x")
        assert set(contents(tmp_path)) > own
        remove_leftovers(tmp_path)
        assert set(contents(tmp_path)) == own
        made.mkdir()  # for the block to end well
    remove_leftovers(tmp_path / "nowhere")


HOLDS = """
    import sys
    from pathlib import Path
    from snugtune.files import scratch_folder

    folder, remove = scratch_folder(Path(sys.argv[1]), "resting")
    (folder / "a.safetensors").write_text("a")
    print(folder, flush=True)
    sys.stdin.read()
    remove()
"""
"""Has a scratch folder until its stdin ends."""


def test_scratch_folders_of_killed_processes_are_swept(tmp_path: Path):
    """Those of living ones stay, be it another process or this one; who ends well takes its own along."""
    others = [_begun(HOLDS, tmp_path) for _ in range(3)]
    killed, living, ending = (Path(_said(other)) for other in others)
    own, remove = scratch_folder(tmp_path, "resting")
    (tmp_path / ".part-1-else").mkdir()  # which is nobody's scratch
    others[0].kill()
    others[0].communicate(timeout=60)
    others[2].communicate(timeout=60)
    assert killed.is_dir() and not ending.exists()
    remove_abandoned(tmp_path, "resting")
    assert set(tmp_path.iterdir()) == {living, own, tmp_path / ".part-1-else"}
    assert (living / "a.safetensors").read_text() == "a"
    others[1].kill()
    others[1].communicate(timeout=60)
    remove()
    remove_abandoned(tmp_path, "resting")
    assert set(tmp_path.iterdir()) == {tmp_path / ".part-1-else"}
    remove_abandoned(tmp_path / "nowhere", "resting")
    assert not (tmp_path / "nowhere").exists()


def test_a_scratch_folder_that_is_swept_before_it_is_held_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that sweeps may look between the making of a folder and its claim."""
    sweeping, make = list[FileLock](), tempfile.mkdtemp

    def made(**how: str) -> str:
        folder = make(**how)
        if not sweeping:
            sweeping.append(FileLock(Path(folder, ".lock")))
            sweeping[0].acquire()
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    folder, _ = scratch_folder(tmp_path, "resting")
    assert folder != Path(sweeping[0].lock_file).parent
    sweeping[0].release()
    remove_abandoned(tmp_path, "resting")
    assert list(tmp_path.iterdir()) == [folder]


# Texts -----------------------------------------------------------------------------------------------------------------


def test_a_text_is_replaced_whole(tmp_path: Path):
    for text in ("a long old text", "grün 😀\n"):
        write_whole(tmp_path / "made", text)
        assert contents(tmp_path) == {"made": text}


@pytest.mark.parametrize("old", [True, False])
def test_a_text_that_cannot_be_written_leaves_the_old(tmp_path: Path, old: bool):
    """Half an emoji has no bytes in UTF-8."""
    if old:
        write_whole(tmp_path / "made", "old")
    with pytest.raises((StorageError, UnicodeError)):
        write_whole(tmp_path / "made", "new \ud83d")
    assert contents(tmp_path) == ({"made": "old"} if old else {})


# Metrics ---------------------------------------------------------------------------------------------------------------


def step(number: int, job: str = "default", **fields) -> StepMetrics:
    return StepMetrics(job, number, 10, number / 10, loss=1.0 / (number + 1), **fields)


def written(path: Path, *metrics: StepMetrics) -> Path:
    log = MetricsFile(path)
    for entry in metrics:
        log.write(entry)
    log.close()
    return path


def steps_of(path: Path) -> list[tuple[object, object]]:
    return [(entry["job"], entry["step"]) for entry in read_metrics(path)]


def test_metrics_are_one_object_a_line(tmp_path: Path):
    """What is not known is left out rather than null, and a step that was skipped says so."""
    seen = {"examples": 1, "total_tokens": 5, "total_label_tokens": 3}
    taken = step(1, tokens=5, label_tokens=3, **seen, lr=0.1, grad_norm=2.0, peak_memory=7)
    path = written(tmp_path / "m.jsonl", taken, step(2, skipped=True, eval_loss=0.5, eval_tokens=9))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"job": "default", "step": 1, "total_steps": 10, "epoch": 0.1, "loss": 0.5, "examples": 1, "tokens": 5,
                     "label_tokens": 3, "total_tokens": 5, "total_label_tokens": 3, "lr": 0.1,
                     "grad_norm": 2.0, "peak_memory": 7}  # fmt: skip
    assert second["skipped"] is True and second["eval_loss"] == 0.5 and second["eval_tokens"] == 9
    assert "grad_norm" not in second and "lr" not in second
    assert read_metrics(path) == [first, second]


def test_metrics_are_readable_at_once(tmp_path: Path):
    """People follow the file while it grows, and a kill loses nothing that was reported."""
    log = MetricsFile(tmp_path / "m.jsonl")
    log.write(step(1))
    assert steps_of(tmp_path / "m.jsonl") == [("default", 1)]
    log.sync()
    log.close()


def test_a_new_run_starts_a_new_file(tmp_path: Path):
    written(tmp_path / "m.jsonl", step(1), step(2))
    assert steps_of(written(tmp_path / "m.jsonl", step(1))) == [("default", 1)]


def test_on_resume_metrics_are_cut_back_to_where_each_job_stands(tmp_path: Path):
    """Steps after the checkpoint are trained again and must not stand there twice; kept lines keep their bytes."""
    lines = [(0, "a"), (1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "a"), (1, "c")]
    path = written(tmp_path / "m.jsonl", *(step(number, job) for number, job in lines))
    before = path.read_text().splitlines(keepends=True)
    log = MetricsFile(path, {"a": 1, "b": 2})
    assert path.read_text() == "".join(before[i] for i in (0, 1, 2, 4))
    log.write(step(2, "a"))
    log.close()
    assert steps_of(path) == [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_half_a_last_line_is_not_counted(tmp_path: Path, cut: int):
    """A kill in the middle of a write; the next line starts on a line of its own."""
    path = written(tmp_path / "m.jsonl", step(1), step(2), step(3))
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(path) == [("default", 1), ("default", 2)]
    log = MetricsFile(path, {"default": 3})
    log.write(step(3))
    log.close()
    assert steps_of(path) == [("default", 1), ("default", 2), ("default", 3)]
    assert path.read_text().count("\n") == 3


def test_resume_without_a_file_starts_one(tmp_path: Path):
    log = MetricsFile(tmp_path / "m.jsonl", {"default": 3})
    log.write(step(4))
    log.close()
    assert steps_of(tmp_path / "m.jsonl") == [("default", 4)]


def test_a_place_that_takes_no_metrics_is_a_storage_error(tmp_path: Path):
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*m\.jsonl"):
        MetricsFile(tmp_path / "m.jsonl")


FULL_DISK_METRICS = """
    import os, resource, sys
    from pathlib import Path
    from snugtune.errors import StorageError
    from snugtune.training.metrics import MetricsFile, StepMetrics

    path, kind = Path(sys.argv[1]), sys.argv[2]
    log = MetricsFile(path)
    for number in range(1, 11):
        log.write(StepMetrics("default", number, 10, 0.5))
    size = path.stat().st_size
    if kind == "resume":
        log.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
    try:
        if kind == "resume":
            MetricsFile(path, {"default": 9})
        else:
            log.write(StepMetrics("default", 11, 10, 0.5))
    except StorageError as error:
        print(error)
    else:
        sys.exit("the disk was not full")
    if kind == "write":
        log.close()  # on the way out, after the error: it must not bring up another one
    sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["write", "resume"])
def test_a_full_disk_loses_no_metrics(tmp_path: Path, kind: str):
    """Neither when a line does not fit any more nor when the file is cut back on resume."""
    path = tmp_path / "m.jsonl"
    done = in_a_process(FULL_DISK_METRICS, path, kind)
    assert done.returncode == 7, done.stderr
    assert f"cannot write {path}: " in done.stdout
    assert steps_of(path) == [("default", n) for n in range(1, 11)]
    assert path.read_text().count("\n") == 10 and path.read_text().endswith("\n"), "no part of a line stays"
    assert os.listdir(tmp_path) == ["m.jsonl"]
