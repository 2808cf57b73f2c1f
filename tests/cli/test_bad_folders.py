"""Runs and adapters that were half deleted, damaged, moved or meant for something else; disks that refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import Trouble, assert_refused, contents, files_below, forked
from safetensors.torch import load_file, save_file
from spoil import config, edit, edit_json, refused, remove, replace, truncate, unfinish

pytest_plugins = ("places",)

Spoil = Callable[[Path], object]
RUN_JSON = "run.json"
ODD_PLAN = {"device": "cpu", "weights": "fp3", "micro_batch": 1, "recompute": "none", "head_rows": 9, "threads": 1}


ODD_STEP = {"job": "default", "step": "x", "total_steps": 3, "epoch": 1}


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def act(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata={"format": "pt"})

    return act


def edit_job(**changes: object) -> Spoil:
    def act(checkpoint: Path) -> None:
        state = json.loads((checkpoint / RUN_JSON).read_text())
        job = state["jobs"]["default"] | changes
        state["jobs"]["default"] = {k: v for k, v in job.items() if v is not None or k not in changes}
        (checkpoint / RUN_JSON).write_text(json.dumps(state))

    return act


# --- runs -------------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "metrics-gone": (remove("metrics.jsonl"), ("out/metrics.jsonl", "new output folder")),
    "metrics-damaged": (replace("metrics.jsonl", b'{"job": "default", "ste\n'), ("out/metrics.jsonl", "new output folder")),
    "metrics-of-bytes": (replace("metrics.jsonl", bytes(range(256)) + b"\n"), ("out/metrics.jsonl",)),
    "metrics-of-lists": (replace("metrics.jsonl", b"[1]\n"), ("out/metrics.jsonl",)),
    "plan-damaged": (replace("plan.json", b'{"plan":'), ("out/plan.json", "JSON")),
    "plan-that-is-a-list": (replace("plan.json", b"[]"), ("out/plan.json", "object")),
    "config-of-bytes": (replace("config.yaml", b"model: d\xe9mo\n"), ("out/config.yaml",)),
    "config-that-is-a-folder": (lambda run: ((run / "config.yaml").unlink(), (run / "config.yaml").mkdir()), ("out",)),
    "config-gone": (remove("config.yaml"), ("out is not empty and holds no run",)),
}


@pytest.mark.parametrize("case", RUNS)
def test_finished_runs(ran: Path, case: str) -> None:
    spoil, named = RUNS[case]
    spoil(ran / "out")
    refused(ran, "train", "config.yaml", named=named)


ENDED = {"ended": True, "total": 9, "largest_weight": 0.1, "diverged": False}

CHECKPOINTS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "empty-file": (replace("default.safetensors", b""), ("step-00000002", "'default'")),
    "weights-missing": (edit_tensors("default.safetensors", lambda t: t.pop("weights.flat")), ("step-00000002", "'default'")),
    "weights-of-another-shape": (
        edit_tensors("default.safetensors", lambda t: t.update({"weights.flat": t["weights.flat"][:-1]})),
        ("step-00000002", "'default'"),
    ),
    "optimizer-of-another-shape": (
        edit_tensors("default.safetensors", lambda t: t.update({"optimizer.0.exp_avg": torch.ones(3)})),
        ("step-00000002", "'default'"),
    ),
    "optimizer-missing": (
        edit_tensors("default.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith("optimizer.")]),
        ("step-00000002", "'default'"),
    ),
    "optimizer-of-odd-names": (
        edit_tensors("default.safetensors", lambda t: t.update({"optimizer.first": torch.ones(1)})),
        ("step-00000002", "'default'"),
    ),
    "no-such-job": (edit(RUN_JSON, jobs={}), ("step-00000002", "'default'")),
    "jobs-that-are-a-list": (edit(RUN_JSON, jobs=[]), ("step-00000002",)),
    "job-without-its-data": (edit_job(data=None), ("step-00000002",)),
    "job-without-its-step": (edit_job(step=None), ("step-00000002",)),
    "step-in-words": (edit(RUN_JSON, step="two"), ("step-00000002",)),
    "plan-of-another-kind": (edit(RUN_JSON, plan={"device": "cpu"}), ("step-00000002",)),
    "plan-of-odd-values": (
        edit(RUN_JSON, plan=ODD_PLAN),
        ("step-00000002",),
    ),
    "step-of-a-job-in-words": (edit_job(step="x"), ("step-00000002", "default.step")),
    "best-of-another-kind": (edit_job(best={"x": 1}), ("step-00000002", "'default'", "best.step")),
    "best-that-is-a-number": (edit_job(best=5), ("step-00000002", "'default'", "best")),
    "optimizer-that-is-a-list": (edit_job(optimizer=[]), ("step-00000002", "'default'", "optimizer")),
    "optimizer-of-numbers": (edit_job(optimizer={"0": 5}), ("step-00000002", "'default'", "optimizer.0")),
    "counts-in-words": (edit_job(stale="none"), ("step-00000002", "'default'", "stale")),
    "ended-without-a-step": (edit_job(**ENDED, failure=None, step="x"), ("step-00000002", "default.step")),
    "ended-without-a-word": (edit_job(**ENDED, failure=None), ("step-00000002", "default.failure")),
    "ended-in-numbers": (edit_job(**ENDED, failure=5), ("step-00000002", "default.failure")),
    "ended-by-hearsay": (edit_job(**ENDED | {"diverged": "so they say"}, failure="x"), ("step-00000002", "default.diverged")),
    "job-that-is-a-list": (edit(RUN_JSON, jobs={"default": []}), ("step-00000002", "default")),
    "pending-in-words": (edit(RUN_JSON, pending=[ODD_STEP]), ("step-00000002", "step")),
    "pending-of-odd-fields": (edit(RUN_JSON, pending=[{"x": 1}]), ("step-00000002",)),
    "of-other-weights": (edit(RUN_JSON, base="0"), ("other weights", "step-00000002")),
    "a-file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), ("step-00000002",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(ran: Path, case: str) -> None:
    spoil, named = CHECKPOINTS[case]
    unfinish(ran / "out")
    spoil(ran / "out/checkpoints/step-00000002")
    refused(ran, "train", "config.yaml", named=named)


# --- adapters ---------------------------------------------------------------------------------------------------------

A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
ELSEWHERE = A.replace(".0.", ".7.")
FILE = "adapter_model.safetensors"


def only_a_pickle(adapter: Path) -> None:
    torch.save(load_file(adapter / FILE), adapter / "adapter_model.bin")
    (adapter / FILE).unlink()


def without_stamp(spoil: Spoil) -> Spoil:
    def act(adapter: Path) -> None:
        (adapter / "snugtune.json").unlink()
        spoil(adapter)

    return act


ADAPTERS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "only-a-pickle": (only_a_pickle, ("no adapter_model.safetensors",)),
    "half-a-pair": (edit_tensors(FILE, lambda t: t.pop(B)), ("up_proj", "wrong base?")),
    "other-half-of-a-pair": (edit_tensors(FILE, lambda t: t.pop(A)), ("up_proj", "wrong base?")),
    "another-rank-on-one-side": (edit_tensors(FILE, lambda t: t.update({A: t[A][:3]})), ("up_proj", "wrong base?")),
    "a-vector": (edit_tensors(FILE, lambda t: t.update({A: t[A][0]})), ("up_proj", "wrong base?")),
    "a-cube": (edit_tensors(FILE, lambda t: t.update({B: t[B][..., None]})), ("up_proj", "wrong base?")),
    "no-rank": (edit_tensors(FILE, lambda t: t.update({A: t[A][:0], B: t[B][:, :0]})), ("up_proj",)),
    "no-weights": (edit_tensors(FILE, lambda t: t.clear()), ("no LoRA weights",)),
    "layer-of-another-base": (edit_tensors(FILE, lambda t: t.update({ELSEWHERE: t[A].clone()})), ("layers.7", "wrong base?")),
    "not-numbers": (edit_tensors(FILE, lambda t: t[A].fill_(float("nan"))), (FILE, "not finite")),
    "strange-key": (edit_tensors(FILE, lambda t: t.update({"x.magnitude": torch.ones(1)})), ("x.magnitude",)),
    "weights-that-are-a-page": (replace(FILE, b"<html>404</html>"), ("cannot be read",)),
    "config-that-is-a-list": (replace("adapter_config.json", b"[]"), ("adapter_config.json", "object")),
    "config-of-bytes": (replace("adapter_config.json", b"\xff\xfe{"), ("adapter_config.json",)),
    "rank-in-words": (edit("adapter_config.json", r="eight"), ("adapter_config.json",)),
    "alpha-in-words": (edit("adapter_config.json", lora_alpha="much"), ("adapter_config.json", "lora_alpha")),
    "pattern-that-is-a-list": (edit("adapter_config.json", alpha_pattern=[1]), ("cannot be read as an adapter",)),
    "base-that-is-a-number": (edit("adapter_config.json", base_model_name_or_path=5), ("adapter_config.json",)),
    "stamp-that-is-a-list": (replace("snugtune.json", b"[]"), ("snugtune.json", "object")),
    "stamp-cut-off": (truncate("snugtune.json"), ("snugtune.json",)),
    "without-stamp-and-wrong": (without_stamp(edit_tensors(FILE, lambda t: t.update({A: t[A][:, :-1]}))), ("wrong base?",)),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("what", ["chat", "export"])
def test_adapters(ran: Path, what: str, case: str) -> None:
    spoil, named = ADAPTERS[case]
    adapter = ran / "out/adapters/default"
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="./model")
    spoil(adapter)
    args = ("--prompt", "Hi") if what == "chat" else ("--to", "merged", "--output", "exported")
    refused(ran, what, "out/adapters/default", *args, named=named)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_question_that_asks_nothing(ran: Path, text: str) -> None:
    refused(ran, "chat", "out", "--prompt", text, named=("--prompt", "empty"))


NO_RUN = {
    "neither a run folder": ("chat", "tmp", "--prompt", "Hi"),
    "config.yaml is a file": ("export", "config.yaml", "--to", "merged"),
}


@pytest.mark.parametrize(("why", "args"), NO_RUN.items())
def test_no_results_at_all(ran: Path, why: str, args: tuple[str, ...]) -> None:
    refused(ran, *args, named=(why,))


def test_a_template_that_refuses_a_question(ran: Path) -> None:
    """Good enough to learn answers with, it fails on a question alone."""
    template = "{% if messages|length < 2 %}{{ 1 / 0 }}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (ran / "model/chat_template.jinja").write_text(template)
    refused(ran, "chat", "out", "--prompt", "Hi", named=("chat template", "division by zero"))


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2500, 6000, 60_000])
def test_a_full_disk(place: Path, limit: int) -> None:
    """Whichever write it is that does not fit, no half of a file stays."""
    ran = forked("train", "config.yaml", cwd=place, trouble=Trouble(file_limit=limit))
    assert_refused(ran, "cannot write out/")
    left = files_below(place / "out") if (place / "out").exists() else set()
    assert not any(".part-" in name or name.endswith(".lock") for name in left), left


def test_a_full_disk_at_an_export(ran: Path) -> None:
    before = contents(ran)
    done = forked("export", "out", "--to", "merged", "--output", "merged", cwd=ran, trouble=Trouble(file_limit=50_000))
    assert_refused(done, "cannot write merged")
    assert {k: v for k, v in contents(ran).items() if not k.startswith(".std")} == before


@pytest.mark.parametrize("output", ["/proc/self/out", "/sys/out", "/dev/null/out"])
def test_folders_nobody_can_make(place: Path, output: str) -> None:
    config(place, output=output)
    refused(place, "train", "config.yaml", named=(output,))


def test_an_export_nobody_can_write(ran: Path) -> None:
    refused(ran, "export", "out", "--to", "merged", "--output", "/proc/merged", named=("/proc/merged",))
