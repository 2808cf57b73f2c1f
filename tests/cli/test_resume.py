"""Killed, interrupted, out of disk: the same command goes on and ends exactly where an undisturbed run ends.

The truth is an undisturbed run of the same config in a process of its own. LoRA's dropout is on, so that a step that is
trained twice or with other random numbers shows in the weights; AdamW's moments show in every later loss.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import (
    FINE,
    SNUGTUNE,
    Ran,
    Trouble,
    assert_refused,
    assert_same_run,
    contents,
    count_lines,
    exact,
    files_below,
    forked,
    in_a_process,
    messages,
    metrics_of,
    random_moments,
    write_config,
    write_lines,
)
from safetensors.torch import load_file, save_file

from snugtune.files import claimed, remove_leftovers

STEPS = 40
RECORDS = [messages(f"What about {i}?", f"It is {i * i}, or so.", "Sure?", "Yes" + "!" * (i % 4)) for i in range(24)]
LONG_ANSWERS = [messages(f"What about {i}?", "Because " + "and so on " * 6) for i in range(40)]


def write_run(place: Path, **fields: Any) -> None:
    """Data and config of a run of `STEPS` steps that saves its state every 3."""
    write_lines(place / "data.jsonl", RECORDS)
    write_lines(place / "held_out.jsonl", RECORDS[:3])
    write_lines(place / "long.jsonl", LONG_ANSWERS)
    base = {
        "data": "data.jsonl",
        "validation": "held_out.jsonl",
        "output": "run",
        "max_seq_len": 96,
        "batch_size": 2,
        "steps": STEPS,
        "eval_every": 10,
        "checkpoint_every": 3,
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.1},
        "optimizer": {"lr": 5e-3},
        "schedule": {"type": "cosine", "warmup": 4},
        "plan": {"weights": "fp32"},
    }
    write_config(place / "config.yaml", **base | fields)


def train(place: Path, trouble: Trouble = FINE) -> Ran:
    return forked("train", "config.yaml", cwd=place, trouble=trouble)


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def undisturbed(place: Path, **fields: Any) -> Path:
    """The run folder of a run that nothing befell."""
    write_run(place, **fields)
    ran = train(place)
    assert ran.code == 0, ran.err
    return place / "run"


@pytest.fixture(scope="module")
def fields(model_folder: Path) -> dict[str, Any]:
    return {"model": model_folder}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> Path:
    return undisturbed(tmp_path_factory.mktemp("truth"), **fields)


@pytest.fixture
def place(tmp_path: Path, fields: dict[str, Any]) -> Path:
    write_run(tmp_path, **fields)
    return tmp_path


def killed_after(place: Path, lines: int) -> None:
    """A run killed after `lines` lines of metrics."""
    assert train(place, Trouble(signal.SIGKILL, lines)).code == -signal.SIGKILL


def resumed(place: Path) -> None:
    """What the same command without trouble makes of it."""
    ran = train(place)
    assert ran.code == 0, ran.err


def test_the_truth_is_worth_comparing_with(truth: Path) -> None:
    """Every step once, a learning rate that moves, evaluations, and the last two checkpoints."""
    lines = metrics_of(truth)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 10, 20, 30, 40]
    assert len({line["lr"] for line in lines[1:]}) > STEPS // 2
    assert lines[-1]["loss"] < 0.8 * lines[1]["loss"]
    assert sorted(p.name for p in (truth / "checkpoints").iterdir()) == ["step-00000036", "step-00000039"]


def test_two_processes_agree(place: Path, truth: Path) -> None:
    """Otherwise no comparison below would mean anything."""
    resumed(place)
    assert_same_run(place / "run", truth)


@pytest.mark.slow
def test_killed_at_ten_random_moments(place: Path, truth: Path) -> None:
    """One run, killed ten times on its way."""
    for moment in random_moments(10, STEPS, seed=0):
        ran = train(place, moment)
        assert ran.code == -signal.SIGKILL, ran.err
    resumed(place)
    assert_same_run(place / "run", truth)


@pytest.mark.parametrize("lines", [2, 17, STEPS + 1], ids=["before-any-checkpoint", "between", "after-the-last-step"])
def test_killed(place: Path, truth: Path, lines: int) -> None:
    killed_after(place, lines)
    resumed(place)
    assert_same_run(place / "run", truth)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted(place: Path, truth: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM save the state wherever it stands, between two checkpoints too, and lose not a step."""
    done = 0
    for lines in (9, 18, 28):
        ran = train(place, Trouble(number, after_lines=lines))
        assert ran.code == 130
        assert done == 0 or f"resuming after step {done}\n" in ran.err
        done = metrics_of(place / "run")[-1]["step"]
        assert lines - 1 <= done < STEPS
        assert ran.err.splitlines()[-1] == f"error: interrupted at step {done}; state saved, the same command goes on from there"
        assert (place / f"run/checkpoints/step-{done:08d}").is_dir()
    resumed(place)
    assert_same_run(place / "run", truth)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted_while_loading(place: Path, truth: Path, number: signal.Signals) -> None:
    ran = train(place, Trouble(number, watched=".stderr", after_lines=1))
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == "error: interrupted before training; nothing is lost, the same command begins again"
    assert not (place / "run").exists()
    resumed(place)
    assert_same_run(place / "run", truth)


def test_killed_while_loading(place: Path, truth: Path) -> None:
    """Nothing but the claim of its new folder is left, and that holds nobody up."""
    ran = train(place, Trouble(signal.SIGKILL, watched=".stderr", after_lines=1))
    assert ran.code == -signal.SIGKILL
    assert files_below(place / "run") == {".lock"}
    resumed(place)
    assert_same_run(place / "run", truth)


def test_interrupted_in_a_real_process(place: Path) -> None:
    """What a shell sees: the exit code, one line, no traceback."""
    with subprocess.Popen(
        [*SNUGTUNE, "train", "config.yaml", "--set", "steps=2000"],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while count_lines(place / "run/metrics.jsonl") < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    *notes, last = err.splitlines()
    assert last.startswith("error: interrupted at step ")
    assert all(note.startswith("  ") for note in notes)
    assert (place / "run/checkpoints").is_dir()


def test_interrupted_while_evaluating(tmp_path: Path, fields: dict[str, Any]) -> None:
    """With one short example a step and a long evaluation after each, a signal comes in an evaluation."""
    fields = fields | {"validation": "long.jsonl", "eval_every": 1, "steps": 6, "batch_size": 1, "checkpoint_every": 100}
    truth = undisturbed(new_folder(tmp_path / "truth"), **fields)
    place = new_folder(tmp_path / "place")
    write_run(place, **fields)
    for lines in (0, 3, 5):
        ran = train(place, Trouble(signal.SIGTERM, after_lines=lines, delay=0.02))
        assert ran.code == 130, ran.err
    resumed(place)
    kept = exact(metrics_of(place / "run"))
    assert kept == exact(metrics_of(truth))
    assert [line["step"] for line in kept] == list(range(7))
    assert all("eval_loss" in line for line in kept)


def test_killed_with_two_jobs(tmp_path: Path, fields: dict[str, Any]) -> None:
    """One job ends before the other; the kill comes after that, and both adapters and their metrics are the truth's."""
    fields = fields | {"jobs": [{"name": "short", "steps": 5, "seed": 1}, {"name": "long", "steps": 14}], "eval_every": None}
    truth = undisturbed(new_folder(tmp_path / "truth"), **fields)
    for name, lines in (("early", 6), ("late", 18)):  # both after step 2, and "long" alone after step 9 or so
        place = new_folder(tmp_path / name)
        write_run(place, **fields)
        killed_after(place, lines)
        assert (place / "run/adapters/short").is_dir() == (name == "late")
        resumed(place)
        assert_same_run(place / "run", truth)


def test_the_number_of_threads_goes_on(place: Path, truth: Path) -> None:
    """Another number of threads sums in another order: a resumed run keeps the one it began with."""
    killed_after(place, 8)
    ran = train(place, Trouble(threads=2))
    assert ran.code == 0, ran.err
    assert_same_run(place / "run", truth)
    assert (place / "run/plan.json").read_text().count('"threads": 1') == 1


def test_changed_data_is_not_trained_on_unnoticed(place: Path, truth: Path) -> None:
    """The config names the same file, but what it holds is something else; brought back, the run goes on."""
    killed_after(place, 8)
    write_lines(place / "data.jsonl", RECORDS[::-1])
    (place / "run/.lock").unlink()  # the killed process' own
    remove_leftovers(place / "run")  # which it may have been in the middle of
    before = contents(place / "run")
    assert_refused(train(place), "data: the examples of job 'default' are not those")
    assert contents(place / "run") == before
    write_lines(place / "data.jsonl", RECORDS)
    resumed(place)
    assert_same_run(place / "run", truth)


def test_another_base_is_not_trained_on_unnoticed(place: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    """The config names the same model folder, but other weights lie there now."""
    model = shutil.copytree(fields["model"], tmp_path / "model")
    write_run(place, **fields | {"model": model})
    killed_after(place, 8)
    weights = load_file(model / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    assert_refused(train(place), "other weights now")


def test_a_folder_has_one_writer(place: Path, truth: Path) -> None:
    """A second process is refused while the first trains; the first does not notice, and leaves no lock behind."""
    killed_after(place, 8)
    with claimed(place / "run"):
        before = contents(place / "run")
        assert_refused(train(place), "another process is training in run")
        assert contents(place / "run") == before
    resumed(place)
    assert_same_run(place / "run", truth)
    assert not (place / "run/.lock").exists()


# --- what is left lying about -----------------------------------------------------------------------------------------


def half_a_line(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"job": "default", "step": 9, "lo')


def unfinished_folders(run: Path) -> None:
    """What a process leaves that is killed while it writes a checkpoint, and an adapter."""
    for target in (run / "checkpoints/step-00000009", run / "adapters/default"):
        assert in_a_process(_die_in_a_folder, target) == 9


def _die_in_a_folder(target: Path) -> None:
    from snugtune.files import whole_folder

    with whole_folder(target) as made:
        (made / "half.safetensors").write_bytes(b"half")
        os._exit(9)


@pytest.mark.parametrize("leave", [half_a_line, unfinished_folders])
def test_remains_of_a_kill_are_cleared_away(place: Path, truth: Path, leave: Callable[[Path], None]) -> None:
    killed_after(place, 8)
    before = files_below(place / "run")
    leave(place / "run")
    assert leave is half_a_line or len(files_below(place / "run")) == len(before) + 2
    resumed(place)
    assert_same_run(place / "run", truth)


def test_killed_before_the_first_file(place: Path, truth: Path) -> None:
    """Nothing but the beginnings of config.yaml is there; that is no reason to refuse the folder."""
    (place / "run").mkdir()
    assert in_a_process(_die_in_a_file, place / "run/config.yaml") == 9
    assert len(files_below(place / "run")) == 1
    resumed(place)
    assert_same_run(place / "run", truth)


def _die_in_a_file(target: Path) -> None:
    from snugtune.files import write_whole

    os.replace = lambda *names: os._exit(9)
    write_whole(target, "half")


def test_what_the_user_keeps_in_the_run_folder_stays(place: Path) -> None:
    """A repository, notes: only what snugtune itself was writing is cleared away."""
    killed_after(place, 8)
    own = {".git/HEAD": b"ref: main\n", ".notes": b"lr too high?\n", "checkpoints/.keep/me": b"x", "adapters/.cache/y": b"y"}
    for name, raw in own.items():
        (place / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "run" / name).write_bytes(raw)
    resumed(place)
    after = contents(place / "run")
    assert {name: after.get(name) for name in own} == own


# --- a full disk ------------------------------------------------------------------------------------------------------


def size(path: Path) -> int:
    return path.stat().st_size


FULL: dict[str, tuple[dict[str, Any], Callable[[Path], int], str]] = {
    # The state is the adapter and two moments, so the limit lets no checkpoint through.
    "checkpoint": ({}, lambda truth: 2 * size(truth / "adapters/default/adapter_model.safetensors"), "checkpoints/step-"),
    # Without checkpoints on the way the adapter is the first large file.
    "adapter": (
        {"checkpoint_every": 1000},
        lambda truth: size(truth / "adapters/default/adapter_model.safetensors") - 100,
        "adapters/default",
    ),
    # A small adapter beside a larger vocabulary.
    "tokenizer": (
        {"checkpoint_every": 1000, "method": {"type": "lora", "r": 1, "target_modules": ["v_proj"], "lora_dropout": 0.1},
         "eval_every": None, "steps": 10},
        lambda truth: size(truth / "adapters/default/tokenizer.json") - 100,
        "adapters/default",
    ),
    "metrics": ({"checkpoint_every": 1000}, lambda truth: size(truth / "metrics.jsonl") // 2, "metrics.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", FULL)
def test_full_disk(tmp_path: Path, truth: Path, fields: dict[str, Any], case: str) -> None:
    """One line and exit code 2; what was there stays as it was, nothing half-written; with room again, all is well."""
    own, limit, named = FULL[case]
    if own:
        truth = undisturbed(new_folder(tmp_path / "truth"), **fields | own)
    place = new_folder(tmp_path / "place")
    write_run(place, **fields | own)
    assert train(place, Trouble(signal.SIGTERM, after_lines=5)).code == 130
    saved = max((place / "run/checkpoints").iterdir())
    before = contents(saved)
    ran = train(place, Trouble(file_limit=limit(truth)))
    assert_refused(ran, "cannot write", named)
    assert contents(saved) == before
    assert not (place / "run/adapters/default").exists()
    assert not [p for p in files_below(place / "run") if "/." in f"/{p}"]
    resumed(place)
    lines = exact(metrics_of(place / "run"))
    assert lines == exact(metrics_of(truth))
    ours, theirs = (f / "adapters/default/adapter_model.safetensors" for f in (place / "run", truth))
    assert ours.read_bytes() == theirs.read_bytes()


def test_full_disk_from_the_start(place: Path, truth: Path) -> None:
    ran = train(place, Trouble(file_limit=300))
    assert_refused(ran, "cannot write", "config.yaml")
    assert not any(p.is_file() for p in (place / "run").rglob("*"))
    resumed(place)
    assert_same_run(place / "run", truth)


def test_full_disk_while_resuming(place: Path, truth: Path) -> None:
    """Metrics are cut back to the checkpoint when a run goes on; without room for that, they stay as they were."""
    killed_after(place, 30)
    before = metrics_of(place / "run")
    ran = train(place, Trouble(file_limit=size(place / "run/metrics.jsonl") // 2))
    assert_refused(ran, "cannot write", "metrics.jsonl")
    assert metrics_of(place / "run")[:20] == before[:20]
    resumed(place)
    assert_same_run(place / "run", truth)
