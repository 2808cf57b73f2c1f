"""The commands on a tiny model: what they write, what they print, and to which stream.

The model of these tests learns one conversation by heart, so that what it answers is known beforehand: to the same question
it says "first", and asked again "second".
"""

import gzip
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import (
    SNUGTUNE,
    Ran,
    assert_refused,
    command,
    contents,
    files_below,
    forked,
    here,
    messages,
    metrics_of,
    write_config,
    write_lines,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import CHATML, VOCAB, relative

STEPS, WARMUP, RATE = 50, 5, 1e-2
TALK = messages("Say it", "first", "Say it", "second")
TALK_AS_TEXT = (
    "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
    "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\nsecond<|im_end|>\n"
)


def taught(model: Path, **fields: Any) -> dict[str, Any]:
    """Fields of a config under which the tiny model learns its data by heart."""
    return {
        "model": model,
        "data": "talk.jsonl",
        "output": "run",
        "max_seq_len": 64,
        "batch_size": 1,
        "steps": STEPS,
        "checkpoint_every": 20,
        "method": {"r": 16, "lora_alpha": 32},
        "optimizer": {"lr": RATE},
        "plan": {"weights": "fp32"},
    } | fields


@dataclass(frozen=True)
class Trained:
    """A finished run, how its command ended, and its peak memory as the system saw it."""

    place: Path
    ran: Ran
    peak_bytes: int

    @property
    def run(self) -> Path:
        return self.place / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Trained:
    """`python -m snugtune train` in a real process."""
    place = tmp_path_factory.mktemp("trained")
    write_lines(place / "talk.jsonl", [TALK])
    fields = taught(model_folder, validation="talk.jsonl", eval_every=20, schedule={"type": "cosine", "warmup": WARMUP})
    write_config(place / "config.yaml", **fields)
    # Through a small process of its own, since this one's memory would be counted as its child's before it turns into Python.
    measured = (
        "import resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[2:]).returncode\n"
        "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measured, "peak", sys.executable, "-m", "snugtune", "train", "config.yaml"],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Trained(place, Ran(done.returncode, done.stdout, done.stderr), int((place / "peak").read_text()) * 1024)


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_writes_the_run_folder(trained: Trained) -> None:
    """Exactly these files; weights as safetensors alone."""
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "snugtune.json", "chat_template.jinja",
               "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert files_below(trained.run) == {
        "config.yaml",
        "data.json",
        "jobs.json",
        "plan.json",
        "report.html",
        "metrics.jsonl",
        *(f"adapters/default/{name}" for name in adapter),
        *(f"checkpoints/step-000000{step}/{name}" for step in (20, 40) for name in ("run.json", "default.safetensors")),
    }


def test_ctrl_c_while_libraries_are_imported(tmp_path: Path) -> None:
    """At any moment of the start: one line, no traceback, no crash."""
    for delay in (0.3, 0.6, 1.0):
        process = subprocess.Popen(
            [*SNUGTUNE, "doctor", "--quick"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, 0, -signal.SIGINT), err  # -SIGINT: before a line of ours has run
        assert "Traceback" not in err or process.returncode == -signal.SIGINT, err


def test_data_show_prints_no_control_characters(tmp_path: Path, model_folder: Path) -> None:
    write_lines(tmp_path / "data.jsonl", [messages("evil \x1b[31mred\x1b[0m", "ok\x07")])
    config = write_config(tmp_path / "c.yaml", model=model_folder, data=tmp_path / "data.jsonl", output=tmp_path / "run")
    shown = here("data", "show", config)
    assert shown.code == 0 and "red" in shown.out
    assert not any(ord(c) < 32 and c != "\n" for c in shown.out)


def test_train_says_what_it_does(trained: Trained) -> None:
    """Results to stdout, progress to stderr, and without a terminal plain lines on both."""
    assert "default" in trained.ran.out
    assert str(Path("run/adapters/default")) in trained.ran.out
    assert "run/metrics.jsonl" in trained.ran.out
    losses = [line["loss"] for line in metrics_of(trained.run)[1:]]
    assert f"{sum(losses[:10]) / 10:.4f} -> {sum(losses[-10:]) / 10:.4f}" in trained.ran.out
    assert "loss (first 10 -> last 10 steps)" in trained.ran.out
    assert f"step {STEPS}/{STEPS}" in trained.ran.err
    assert "data (default): 1 training example," in trained.ran.err
    for text in (trained.ran.out, trained.ran.err):
        assert "\x1b" not in text
        assert "\r" not in text
    assert all(line.startswith("  ") for line in trained.ran.err.splitlines())


def test_config_is_kept_resolved(trained: Trained) -> None:
    """What was given, and the defaults of what was not, so that a later version's defaults change nothing."""
    given = yaml.safe_load((trained.place / "config.yaml").read_text())
    kept = yaml.safe_load((trained.run / "config.yaml").read_text())
    for name in ("model", "output", "max_seq_len", "batch_size", "steps", "eval_every", "validation"):
        assert kept[name] == given[name]
    assert [(source["path"], source["format"]) for source in kept["data"]] == [("talk.jsonl", "auto")]
    assert kept["method"] | given["method"] == kept["method"]
    assert kept["method"]["target_modules"] == "all-linear"
    assert kept["optimizer"] == {"type": "adamw", "lr": RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert kept["schedule"] == {"type": "cosine", "warmup": WARMUP}
    knobs = ("micro_batch", "recompute", "optimizer_state", "gradients", "offload", "head_rows", "execution", "resident_jobs")
    free = dict.fromkeys(knobs, "auto")
    assert kept["plan"] == {"weights": "fp32", "double_quant": False, "outlier_threshold": 0.0, "exact": False, **free}


def test_plan_holds_the_measured_peak(trained: Trained) -> None:
    """The system's own figure for the whole process is the truth, and it is reached before the run ends."""
    plan = json.loads((trained.run / "plan.json").read_text())
    # Linux keeps the two figures apart by a few pages per thread.
    assert 0.95 * trained.peak_bytes <= plan["measured_peak_bytes"] <= trained.peak_bytes + 2**20
    assert plan["measured"]["total_bytes"] == plan["measured_peak_bytes"]
    assert plan["measured"]["weights"] == plan["estimate"]["weights"]
    assert plan["plan"]["weights"] == "fp32"
    assert plan["plan"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert plan["plan"]["threads"] == 1
    assert plan["plan"]["micro_batch"] == 16, "1024 tokens a forward"
    assert plan["plan"]["recompute"] in ("none", "blocks")


def test_metrics_hold_every_step_once(trained: Trained) -> None:
    lines = metrics_of(trained.run)
    assert [(line["job"], line["step"]) for line in lines] == [("default", step) for step in range(STEPS + 1)]
    keys = {"job", "step", "loss", "tokens", "label_tokens", "lr", "grad_norm", "tokens_per_second", "peak_memory"}
    assert all(keys <= line.keys() for line in lines[1:])
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 20, 40, 50]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert all(line["tokens_per_second"] > 0 and line["peak_memory"] > 2**26 for line in lines[1:])


def test_metrics_are_true(trained: Trained, model_folder: Path) -> None:
    """Tokens counted with the model's tokenizer, the rate by its formula, the first loss with the model itself."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor(tokenizer(TALK_AS_TEXT, add_special_tokens=False)["input_ids"])
    ends = [i for i, token in enumerate(ids.tolist()) if token == tokenizer.convert_tokens_to_ids("<|im_end|>")]
    answers = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in ("first", "second")]
    labels = [*range(ends[1] - answers[0], ends[1] + 1), *range(ends[3] - answers[1], ends[3] + 1)]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)(input_ids=ids[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[[i - 1 for i in labels]], ids[labels])
    start, first, *_ = lines = metrics_of(trained.run)
    assert start["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert first["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert start["eval_tokens"] == len(labels)
    for line in lines[1:]:
        assert line["tokens"] == len(ids)
        assert line["label_tokens"] == len(labels)
        done = (line["step"] - 1 - WARMUP) / (STEPS - WARMUP)
        rate = (line["step"] - 1) / WARMUP if line["step"] <= WARMUP else 0.5 * (1 + math.cos(math.pi * done))
        assert line["lr"] == pytest.approx(RATE * rate)


def test_the_adapter_is_peft_and_says_where_it_comes_from(trained: Trained, model_folder: Path) -> None:
    adapter = trained.run / "adapters/default"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 16, 32)
    assert config["base_model_name_or_path"] == str(model_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(adapter))
    named = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    stored = load_file(adapter / "adapter_model.safetensors")
    assert named.keys() == stored.keys()
    assert all(torch.equal(named[name], stored[name]) for name in stored)
    card = (adapter / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == (str(model_folder), "peft")
    assert f"{STEPS} steps" in card


def test_a_finished_run_says_so(trained: Trained) -> None:
    """The same command again: nothing is trained, nothing changes, and it is no error. Its own config is the same one."""
    before = contents(trained.run)
    for config in ("config.yaml", "run/config.yaml"):
        ran = forked("train", config, cwd=trained.place)
        assert ran.code == 0, ran.err
        assert "this run is finished" in ran.err
        assert "run/adapters/default" in ran.out
        assert contents(trained.run) == before


def test_set_overrides_fields(tmp_path: Path, model_folder: Path) -> None:
    """Groups, lists, a group given by its name alone, and numbers as people write them."""
    write_lines(tmp_path / "talk.jsonl", [TALK])
    jobs = [{"name": "a"}, {"name": "b"}]
    write_config(tmp_path / "config.yaml", **taught(model_folder, data=[{"path": "none.jsonl"}], schedule="linear", jobs=jobs))
    sets = ("optimizer.lr=1e-3", "data.0.path=talk.jsonl", "schedule.warmup=0.5", "jobs.1.seed=7", "steps=2", "eval_every=null",
            "plan.micro_batch=2", "output=elsewhere")  # fmt: skip
    ran = forked("train", "config.yaml", *(part for s in sets for part in ("--set", s)), cwd=tmp_path)
    assert ran.code == 0, ran.err
    kept = yaml.safe_load((tmp_path / "elsewhere/config.yaml").read_text())
    assert kept["optimizer"]["lr"] == 1e-3
    assert kept["data"][0]["path"] == "talk.jsonl"
    assert kept["schedule"] == {"type": "linear", "warmup": 0.5}
    assert kept["jobs"] == [{"name": "a"}, {"name": "b", "seed": 7}]
    assert kept["plan"]["micro_batch"] == 2
    assert [line["lr"] for line in metrics_of(tmp_path / "elsewhere") if line["job"] == "a"] == [0.0, 1e-3]
    adapters = [load_file(tmp_path / f"elsewhere/adapters/{name}/adapter_model.safetensors") for name in "ab"]
    assert not all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_jobs_give_an_adapter_each(tmp_path: Path, model_folder: Path) -> None:
    """Two jobs on one base learn different answers to one question, and each adapter gives its own."""
    jobs = []
    for name in ("red", "blue"):
        write_lines(tmp_path / f"{name}.jsonl", [messages("Colour?", name)])
        jobs.append({"name": name, "data": f"{name}.jsonl"})
    write_config(tmp_path / "config.yaml", **taught(model_folder, data=None, jobs=jobs, steps=30))
    ran = forked("train", "config.yaml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in (tmp_path / "run/adapters").iterdir()) == ["blue", "red"]
    lines = [(line["job"], line["step"]) for line in metrics_of(tmp_path / "run")]
    assert sorted(lines) == [(name, step) for name in ("blue", "red") for step in range(1, 31)]
    for name in ("red", "blue"):
        assert f"run/adapters/{name}" in ran.out
        assert here("chat", tmp_path / "run", "--adapter", name, "--prompt", "Colour?").out == f"{name}\n"


def test_sources_of_every_kind_in_turns(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with names of its own and packed lines, two to one; what is shown is what is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("question,reply\n" + "".join(f"Q{i},A{i}\n" for i in range(4)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "P", "completion": "C"}\n' * 2))
    sources = [{"path": "a.csv", "columns": {"instruction": "question", "output": "reply"}, "weight": 2}, "b.jsonl.gz"]
    write_config(tmp_path / "config.yaml", **taught(model_folder, data=sources, mixing="interleave", steps=1))
    shown = here("data", "show", "config.yaml", "-n", "9")
    assert shown.code == 0, shown.err
    titles = [line for line in shown.out.splitlines() if line.startswith(("a.csv:", "b.jsonl.gz:"))]
    order = ["a.csv:2", "a.csv:3", "b.jsonl.gz:1", "a.csv:4", "a.csv:5", "b.jsonl.gz:2"]
    assert [title.split(": ")[0] for title in titles] == order
    assert here("train", "config.yaml").code == 0


def test_plain_text_is_learned_by_clm(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of documents; a model that has learned one by heart goes on with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    text = "The snug fox tunes a lamp."
    (tmp_path / "texts/a.txt").write_text(text)
    fields = taught(model_folder, data="texts", objective="clm", batch_size=1)
    write_config(tmp_path / "config.yaml", **fields)
    assert "The« snug fox" in here("data", "show", "config.yaml").out
    ran = forked("train", "config.yaml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(tmp_path / "run/adapters/default"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(text[:8], add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == text


def test_a_job_that_diverges_is_given_up_alone(tmp_path: Path, model_folder: Path) -> None:
    """The other ends with the bits it has without that neighbour; the exit code and the last line tell; nothing is retried."""
    write_lines(tmp_path / "talk.jsonl", [TALK])
    good, bad = {"name": "good"}, {"name": "bad", "optimizer": {"lr": 1e30}}
    for output, jobs in (("both", [bad, good]), ("alone", [good])):
        write_config(tmp_path / f"{output}.yaml", **taught(model_folder, output=output, jobs=jobs))
    assert forked("train", "alone.yaml", cwd=tmp_path).code == 0
    for _ in range(2):  # the second time nothing is left to do
        last = assert_refused(forked("train", "both.yaml", cwd=tmp_path), "job 'bad'", "no finite gradient", "optimizer.lr")
        assert "'good'" not in last
    weights = "adapters/good/adapter_model.safetensors"
    assert (tmp_path / "both" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    assert not (tmp_path / "both/adapters/bad").exists()
    skipped = [line["step"] for line in metrics_of(tmp_path / "both") if line.get("skipped")]
    assert len(skipped) == 10
    assert [line["step"] for line in metrics_of(tmp_path / "both") if line["job"] == "good"] == list(range(1, STEPS + 1))


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write_lines(tmp_path / "home/talk.jsonl", [TALK])
    fields = taught(model_folder, data="~/talk.jsonl", output="~/run", steps=1)
    write_config(tmp_path / "config.yaml", **fields)
    monkeypatch.chdir(tmp_path)
    assert here("train", "config.yaml").code == 0
    assert (tmp_path / "home/run/adapters/default").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_sharded_model_is_the_same_model(tmp_path: Path, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    shutil.copytree(model_folder, tmp_path / "sharded")
    (tmp_path / "sharded/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    write_lines(tmp_path / "talk.jsonl", [TALK])
    for output, folder in (("whole", model_folder), ("shards", tmp_path / "sharded")):
        write_config(tmp_path / "config.yaml", **taught(folder, output=output, steps=2))
        assert forked("train", "config.yaml", cwd=tmp_path).code == 0
    whole, shards = (load_file(tmp_path / o / "adapters/default/adapter_model.safetensors") for o in ("whole", "shards"))
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_the_whole_model_can_be_trained(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`method: full` leaves a model folder that transformers loads, chat answers with, and export has nothing to add to."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "talk.jsonl", [TALK])
    write_config(tmp_path / "config.yaml", **taught(model_folder, method="full", optimizer={"lr": 3e-3}))
    ran = forked("train", "config.yaml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    folder = tmp_path / "run/models/default"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files_below(folder)
    assert answer(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), "Say it") == "first"
    assert here("chat", "run", "--prompt", "Say it").out == "first\n"
    compared = here("chat", "run", "--compare", "--prompt", "Say it", "--max-new-tokens", "8")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = answer(base, AutoTokenizer.from_pretrained(model_folder), "Say it", new_tokens=8)
    assert compared.out == f"base:\n{before}\n\ntuned:\nfirst\n", compared.err
    assert f"two in memory, the tuned one and '{model_folder}'" in compared.err
    exported = here("export", "run", "--to", "merged")
    assert exported.code == 2
    assert exported.err.startswith("error: run tuned the whole model; run/models/default is a model folder already")


def test_a_model_without_chat_template_gets_a_plain_one(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and what is trained with it is asked with it: in chat and, exported, anywhere."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    write_lines(tmp_path / "talk.jsonl", [TALK])
    write_config(tmp_path / "config.yaml", **taught(Path("model"), data="talk.jsonl"))
    shown = here("data", "show", "config.yaml")
    assert "no chat template" in shown.err
    assert "### User:\nSay it\n\n### Assistant:\n«first<|im_end|>»\n\n### User:\nSay it" in shown.out
    ran = forked("train", "config.yaml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "no chat template" in ran.err
    chat = here("chat", "run", "--prompt", "Say it")
    assert (chat.out, chat.err) == ("first\n", ""), "what was said in training is not said at each start"
    foreign = shutil.copytree(tmp_path / "run/adapters/default", tmp_path / "foreign")
    (foreign / "snugtune.json").unlink()
    assert "no chat template" in here("chat", foreign, "--prompt", "Say it").err
    assert here("export", "run", "--to", "merged").code == 0
    merged = tmp_path / "run/merged"
    assert answer(AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged), "Say it") == "first"


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat_prints_the_answer_and_nothing_else(trained: Trained) -> None:
    ran = forked("chat", "run", "--prompt", "Say it", cwd=trained.place)
    assert (ran.code, ran.out) == (0, "first\n"), ran.err
    assert all(line.startswith("  ") for line in ran.err.splitlines()), ran.err


def test_chat_keeps_the_conversation(trained: Trained) -> None:
    """From a pipe: the second answer needs the first turn, /new forgets it, /exit ends before what follows."""
    ran = command("chat", "run", cwd=trained.place, stdin="Say it\n\nSay it\n/new\nSay it\n/exit\nSay it\n")
    assert (ran.code, ran.out) == (0, "first\nsecond\nfirst\n"), ran.err


def test_chat_ends_with_its_input(trained: Trained) -> None:
    ran = here("chat", trained.run, stdin="Say it\nSay it")
    assert (ran.code, ran.out) == (0, "first\nsecond\n"), ran.err


def test_chat_compares_with_the_base(trained: Trained, model_folder: Path) -> None:
    """What the untuned model says by transformers' own generation, and what the tuned one says; from one loaded base."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = answer(base, AutoTokenizer.from_pretrained(model_folder), "Say it", new_tokens=8)
    ran = here("chat", trained.run, "--compare", "--prompt", "Say it", "--max-new-tokens", "8")
    assert (ran.code, ran.out) == (0, f"base:\n{before}\n\ntuned:\nfirst\n"), ran.err
    assert "two in memory" not in ran.err
    again = here("chat", trained.run, "--compare", "--max-new-tokens", "8", stdin="Say it\nSay it\n")
    assert again.out.startswith(ran.out), "a conversation begins as a single question does"
    assert again.out.endswith("tuned:\nsecond\n"), "each side remembers its own answers"


def test_chat_takes_an_adapter_folder(trained: Trained, tmp_path: Path) -> None:
    """Wherever it lies, and without our stamp as with it."""
    adapter = shutil.copytree(trained.run / "adapters/default", tmp_path / "adapter")
    assert here("chat", adapter, "--prompt", "Say it").out == "first\n"
    (adapter / "snugtune.json").unlink()
    ran = here("chat", adapter, "--prompt", "Say it")
    assert ran.out == "first\n" and "matched by its names and shapes alone" in ran.err


def test_chat_asks_before_it_runs_code_of_a_model(trained: Trained, tmp_path: Path) -> None:
    """What a run's own config says is no consent of whoever chats with it."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    text = (run / "config.yaml").read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    (run / "config.yaml").write_text(text)
    for args in (("chat", run, "--prompt", "Say it"), ("export", run, "--to", "merged", "--output", tmp_path / "m")):
        assert_refused(here(*args), "--trust-remote-code")
        assert here(*args, "--trust-remote-code").code == 0


def test_chat_is_not_bent_by_the_models_own_habits(trained: Trained, tmp_path: Path, model_folder: Path) -> None:
    """A generation_config.json with penalties and beams: temperature 0 still takes the likeliest token."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    habits = {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "top_k": 1, "num_beams": 3, "min_p": 0.9}
    (model / "generation_config.json").write_text(json.dumps(habits))
    adapter = shutil.copytree(trained.run / "adapters/default", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}))
    assert here("chat", adapter, "--prompt", "Say it").out == "first\n"


def test_chat_draws_as_asked(trained: Trained) -> None:
    """Length, temperature and top-p count, and what is drawn depends on the seed alone."""
    assert here("chat", trained.run, "--prompt", "Say it", "--max-new-tokens", "1").out == "f\n"

    def drawn(seed: int) -> str:
        ran = here("chat", trained.run, "--prompt", "Say it", "--temperature", "50", "--max-new-tokens", "12", "--seed", seed)
        assert ran.code == 0, ran.err
        return ran.out

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    likeliest = here("chat", trained.run, "--prompt", "Say it", "--temperature", "2", "--top-p", "0.01")
    assert likeliest.out == "first\n"


# --- export -----------------------------------------------------------------------------------------------------------


def answer(model: Any, tokenizer: Any, question: str, new_tokens: int = 20) -> str:
    """Plain transformers, with what its folders say about templates and stop tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_export_merged_is_a_model_of_its_own(trained: Trained, model_folder: Path, tmp_path: Path) -> None:
    """It loads without us and without PEFT, computes what base and adapter do in PEFT, and stops where an answer ends."""
    ran = here("export", trained.run, "--to", "merged", "--output", tmp_path / "merged")
    assert "matched by its names" not in ran.err
    assert (ran.code, ran.out) == (0, f"written: {tmp_path / 'merged'}\n"), ran.err
    assert not list((tmp_path / "merged").rglob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.float32
    assert not any("lora" in name for name, _ in model.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    twin = PeftModel.from_pretrained(base, str(trained.run / "adapters/default"))
    ids = (torch.arange(40) * 37 % VOCAB)[None]
    with torch.no_grad():
        assert relative(model(input_ids=ids).logits, twin(input_ids=ids).logits) <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == CHATML
    assert answer(model, tokenizer, "Say it") == "first"


def test_chat_takes_what_export_wrote(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name the folder goes; with nothing beside it to compare it with, and nothing left to export."""
    monkeypatch.chdir(tmp_path)
    assert here("export", trained.run, "--to", "merged", "--output", "demo", "--dtype", "fp32").code == 0
    done = here("chat", "demo", "--prompt", "Say it")
    assert (done.code, done.out) == (0, "first\n"), done.err
    assert_refused(here("chat", "demo", "--prompt", "Say it", "--compare"), "--compare", "does not say which model")
    assert_refused(here("export", "demo", "--to", "merged"), "demo holds no adapter", "is a model folder already")


def test_training_that_diverges_says_so_and_what_to_do(tmp_path: Path, model_folder: Path) -> None:
    """It is done, with code 0: what became of it is for its reader to judge."""
    write_lines(tmp_path / "data.jsonl", [TALK])
    fields = taught(model_folder, data=tmp_path / "data.jsonl", output=tmp_path / "run", steps=4, optimizer={"lr": 1e9})
    done = here("train", write_config(tmp_path / "c.yaml", **fields))
    assert done.code == 0, done.err
    assert re.search(r"default: training blew up: .* lower optimizer\.lr \(it is 1e\+09\)", done.err)


def test_what_is_for_scripts_is_json_alone(tmp_path: Path) -> None:
    """In a process of its own, where libraries print what they like while they are imported."""
    for args in (("doctor", "--json", "--quick"), ("schema",)):
        done = command(*args, cwd=tmp_path)
        assert done.code == 0, done.err
        assert isinstance(json.loads(done.out), dict)


def test_export_has_a_place_and_a_dtype(trained: Trained, tmp_path: Path) -> None:
    """By default beside the run's other results."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    assert here("export", run, "--to", "merged", "--dtype", "bf16").out == f"written: {run / 'merged'}\n"
    assert {t.dtype for t in load_file(run / "merged/model.safetensors").values()} == {torch.bfloat16}
    assert files_below(run) > files_below(trained.run)


# --- data show --------------------------------------------------------------------------------------------------------


def test_data_show_marks_what_is_trained(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and the token that ends them, nothing else; and no letter is lost on the way."""
    monkeypatch.chdir(tmp_path)
    talks = [
        {"messages": [{"role": "system", "content": "Be brief."}, *messages("Say it", "first", "Say it", "second")["messages"]]},
        messages("Größe [b]3[/b]?\n- a\n- b", "Über 2 m — 【ok】 \\ [red]x[/red] :smile: {{ y }}"),
        messages("Tail?", "Yes."),
    ]
    write_lines(tmp_path / "talks.jsonl", talks)
    write_config(tmp_path / "config.yaml", **taught(model_folder, data="talks.jsonl", max_seq_len=128))
    ran = here("data", "show", "config.yaml", "-n", "2")
    assert ran.code == 0, ran.err
    for number, talk in enumerate(talks[:2], 1):
        shown = ran.out.split(f"talks.jsonl:{number}: ")[1].split("\n", 1)[1]
        expected = ""
        for message in talk["messages"]:
            said = message["content"] + "<|im_end|>"
            expected += f"<|im_start|>{message['role']}\n" + (f"«{said}»" if message["role"] == "assistant" else said) + "\n"
        assert shown.startswith(expected + "\n") and not shown.startswith(expected + "\n\n"), "one empty line"
    assert "Tail?" not in ran.out
    assert "default: 3 training examples" in ran.out
    assert not (tmp_path / "run").exists()


def test_data_show_tells_control_tokens_from_text_that_reads_like_them(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody says of `<|im_end|>` is text; the answer's real end stands without a mark."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "talks.jsonl", [messages("Is <|im_end|> an end?", "<|im_end|> it is.")])
    write_config(tmp_path / "config.yaml", **taught(model_folder, data="talks.jsonl", max_seq_len=128))
    out = here("data", "show", "config.yaml").out
    assert "\nIs ⟦<|im_end|>⟧ an end?<|im_end|>\n" in out
    assert "\n«⟦<|im_end|>⟧ it is.<|im_end|>»\n" in out
    assert out.startswith("«...» trained; ⟦...⟧ text that reads like a control token")


def test_data_show_says_how_much_of_each_source_a_mixture_takes(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a.jsonl", 2), ("b.jsonl", 8)):
        write_lines(tmp_path / name, [messages(f"{name} {i}?", "Yes.") for i in range(count)])
    mixed = {"data": [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 2}],
             "mixing": {"type": "interleave", "until": "last"}}  # fmt: skip
    write_config(tmp_path / "config.yaml", **taught(model_folder, **mixed))
    out = here("data", "show", "config.yaml", "-n", "0").out
    assert "default: an epoch takes 4 of a.jsonl (it has 2), 8 of b.jsonl (it has 8)\n" in out
    assert "default: 12 training examples" in out


def test_data_show_counts_what_is_cut_and_dropped(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the place of each, so that it can be looked at."""
    monkeypatch.chdir(tmp_path)
    cut, late = messages("Why?", "Because " + "of that " * 20), messages("Why " * 40, "Late.")
    write_lines(tmp_path / "talks.jsonl", [TALK, cut, late, {"messages": []}, {"text": "hm"}])
    write_config(tmp_path / "config.yaml", **taught(model_folder, data="talks.jsonl", epochs=3, steps=None))
    out = here("data", "show", "config.yaml", "-n", "0").out
    assert "default: 1 example cut to max_seq_len=64 tokens (talks.jsonl:2)\n" in out
    assert "max_seq_len=64 tokens (talks.jsonl:3)\n" in out
    assert "(talks.jsonl:4)\n" in out
    assert "(talks.jsonl:5)\n" in out
    assert "default: 2 training examples" in out
    assert "6 optimizer steps of 1 example\n" in out
    assert "to 64, median" in out


# --- the command itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [(sys.executable, "-m", "snugtune"), (str(Path(sys.executable).with_name("snugtune")),)])
def test_version(start: tuple[str, ...], tmp_path: Path) -> None:
    """The module and the script are the same command."""
    done = subprocess.run([*start, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"snugtune {importlib.metadata.version('snugtune')}\n", "")


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["--version"], ["trian"]], ids=" ".join)
def test_help_is_quick(args: list[str], tmp_path: Path) -> None:
    """Seconds of imports are for the commands that need them."""
    heavy = "torch transformers peft tokenizers datasets numpy"
    script = (
        "import sys\nfrom snugtune.cli import main\ntry:\n    main()\nfinally:\n"
        f"    print('loaded:', [m for m in '{heavy}'.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr
    assert done.returncode == (2 if args == ["trian"] else 0)


LINES: dict[str, tuple[str, ...]] = {
    "trian c.yaml": ("no such command 'trian'; did you mean 'train'?",),
    "foo": ("no such command 'foo'; see snugtune --help",),
    "c.yaml": ("'c.yaml' is no command; did you mean snugtune train c.yaml?",),
    "data shwo c.yaml": ("did you mean 'show'?",),
    "train": ("missing the config (the run's YAML config); see snugtune train --help",),
    "train a b": ("unexpected argument 'b'",),
    "train a seed=1": ("to override a field: --set seed=1",),
    "train a --set": ("--set needs a value",),
    "train a --epochs 3": ("no option --epochs; a field of the config is set by --set epochs=VALUE",),
    "train a --batch-size=3": ("--set batch_size=VALUE",),
    "train a --lr 1e-4": ("--set optimizer.lr=VALUE",),
    "train a --nothing": ("no option --nothing; see snugtune train --help",),
    "chat r --temprature 1": ("did you mean --temperature?",),
    "chat r --temperature hot": ("--temperature: expected a number (got 'hot')",),
    "chat r --max-new-tokens 0": ("--max-new-tokens: must be at least 1 (got '0')",),
    "chat r --compare=1": ("--compare takes no value",),
    "export r": ("missing --to",),
    "--versio": ("did you mean --version?",),
    "a\nb": ("no such command",),
}


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_that_cannot_be_understood(line: str) -> None:
    """As any other mistake: one line, exit code 2."""
    assert_refused(here(*line.split(" ")), *LINES[line])


def test_a_group_of_commands_alone_shows_its_help() -> None:
    assert "show" in here("data").out


def test_help_names_every_command() -> None:
    out = here("--help").out
    assert all(name in out for name in ("demo", "train", "chat", "export", "data", "--version"))


# --- init -------------------------------------------------------------------------------------------------------------


def test_init_writes_what_train_takes(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All flags; in a pipe nothing is asked."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "talk.jsonl", [TALK])
    flags = ("--model", model_folder, "--method", "freeze", "--objective", "sft", "--epochs", "2", "--output", "here")
    ran = here("init", "mine.yaml", *flags, "--data", "talk.jsonl", "--data", "talk.jsonl", stdin="")
    assert ran.code == 0 and "data: talk.jsonl: 1 conversation" in ran.err
    assert "snugtune train mine.yaml" in ran.out
    trained = here("train", "mine.yaml", "--set", "method.last_blocks=1")
    assert trained.code == 0, trained.err
    assert [line["step"] for line in metrics_of(tmp_path / "here")] == [1]
    assert (tmp_path / "here/models/default/model.safetensors").is_file()
    assert_refused(here("init", "mine.yaml", *flags, "--data", "talk.jsonl", "--yes"), "mine.yaml", "--force")
    assert here("init", "mine.yaml", "--data", "talk.jsonl", "--yes", "--force").code == 0
    assert_refused(here("init", stdin=""), "data", "--data")
