"""`snugtune plan` and `memory:`: what is said beforehand, and that the run keeps to it."""

import json
import re
from pathlib import Path

import pytest
from common import command, forked, here, write_config, write_lines

from conftest import WIDE, wide_folder
from snugtune.words import bytes_of

TEXTS = [{"text": f"{i} " + "and so it goes on " * 60} for i in range(8)]
MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_folder(tmp_path_factory.mktemp("planned"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    data = write_lines(tmp_path / "data.jsonl", TEXTS)
    fields = {"objective": {"type": "clm"}, "max_seq_len": 256, "batch_size": 2, "steps": 2, "output": "out"}
    return write_config(tmp_path / "config.yaml", model=model, data=data, **fields)


def test_it_says_what_fits(config: Path) -> None:
    done = here("plan", config, "--memory", "8GiB", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["estimate"]["tokens"] == 512  # sequences of 256, two a step
    assert said["fits"] and said["device"] == "cpu" and said["budget_bytes"] == 8 * 2**30
    parts = {k: v for k, v in said["estimate"].items() if k not in ("when", "holes", "total_bytes", "tokens")}
    assert sum(parts.values()) == said["estimate"]["total_bytes"] <= said["needs_bytes"] <= said["budget_bytes"]
    assert said["plan"]["recompute"] == "none" and said["plan"]["offload"] == "none"  # there is room: nothing is spared
    assert said["longest_context"] == WIDE["max_position_embeddings"] and said["largest_micro_batch"] == 64
    compared = {(row["method"], row["weights"]) for row in said["comparison"]}
    assert compared >= {("lora", "nf4"), ("lora", "int8")} and {method for method, _ in compared} == {"lora", "full"}


def test_people_are_shown_a_bar_and_a_table(config: Path) -> None:
    done = here("plan", config, "--memory", "8GiB")
    assert done.code == 0, done.err
    assert "fits into 8.00 GiB" in done.out and "predicted peak" in done.out and "█" in done.out and "runtime" in done.out
    assert re.search(r"^lora +nf4 +[0-9.]+ GiB +fits", done.out, re.MULTILINE)


def test_what_does_not_fit_is_code_3_and_names_the_smallest(config: Path) -> None:
    done = forked("plan", config, "--memory", "50MiB", "--json", cwd=config.parent)
    assert done.code == 3 and not json.loads(done.out)["fits"]
    found = re.search(r"the smallest budget that works here is ([0-9.]+ GiB)", done.err)
    assert found is not None, done.err
    assert forked("plan", config, "--memory", found[1], cwd=config.parent).code == 0


def test_of_a_config_json_alone_and_a_gpu_that_is_not_here(model: Path, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text((model / "config.json").read_text())
    done = here("plan", "--model", tmp_path / "shape", "--memory", "24GiB", "--device", "cuda", "--max-seq-len", "512", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["device"] == "cuda" and said["plan"]["weights"] == "bf16" and said["estimate"]["runtime"] > 500 * MIB


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((), "a config, or --model"),
        (("--model", "demo", "--device", "cuda"), "give --memory"),
        (("--model", "demo", "--memory", "much"), "'much' is no size"),
        (("--model", "nowhere/at/all"), "no folder"),
        (("--model", "demo", "--set", "seed=3"), "--set changes a config"),
    ],
)
def test_bad_input_is_code_2(args: tuple[str, ...], named: str) -> None:
    done = here("plan", *args)
    assert done.code == 2 and named in done.err and "Traceback" not in done.err


def test_options_change_a_config(config: Path) -> None:
    changed = ("--max-seq-len", "64", "--method", "freeze", "--set", "method.last_blocks=1")
    done = here("plan", config, "--memory", "8GiB", *changed, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["estimate"]["tokens"] == 128 and said["estimate"]["adapters"] == 0
    assert {row["method"] for row in said["comparison"]} == {"freeze", "full", "lora"}


def test_jobs_that_have_their_own_data_are_planned(config: Path, model: Path, tmp_path: Path) -> None:
    """And in a small budget they rest: what is left out is told of, and one plan has one size."""
    own = [
        {"name": name, "data": str(tmp_path / "data.jsonl"), "method": {"type": "lora", "r": rank}}
        for name, rank in (("a", 8), ("b", 64))
    ]
    fields = {"objective": {"type": "clm"}, "max_seq_len": 256, "batch_size": 2, "steps": 2, "output": "out"}
    both = write_config(tmp_path / "both.yaml", model=model, jobs=own, **fields)
    done = here("plan", both, "--memory", "8GiB", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["fits"] and said["rejected"] == []
    assert said["comparison"][1]["method"] == "lora" and said["comparison"][1]["weights"] == said["plan"]["weights"]
    one = json.loads(here("plan", config, "--memory", "8GiB", "--json").out)
    same = next(row for row in one["comparison"] if row["method"] == "lora" and row["weights"] == one["plan"]["weights"])
    assert same["needs"] == one["needs_bytes"]


def test_full_training_is_offered_lora(config: Path) -> None:
    done = here("plan", config, "--method", "full", "--memory", "50MiB")
    assert done.code == 3
    smallest = re.search(r"smallest budget that works here is ([0-9.]+) GiB", done.err)
    assert smallest is not None, done.err
    done = here("plan", config, "--method", "full", "--memory", f"{float(smallest[1]) - 0.02:.2f}GiB")
    assert done.code == 3 and "what would fit:" in done.err and "method: lora (" in done.err


def test_more_memory_may_be_allowed_on_the_way(config: Path, tmp_path: Path) -> None:
    """The plan stays: another budget is no other run."""
    assert forked("train", config, "--set", "memory=8GiB", cwd=tmp_path).code == 0
    done = forked("train", config, "--set", "memory=9GiB", cwd=tmp_path)
    assert done.code == 0 and "this run is finished" in done.err


def test_a_budget_beyond_the_machine_is_told_of(config: Path, tmp_path: Path) -> None:
    from snugtune.config import read_config
    from snugtune.memory import choose

    class Needs:
        def __init__(self, needs: int) -> None:
            self.chosen = self
            self.needs, self.planned, self.plan, self.device = needs, self, self, "cpu"

    stated = read_config(config, ["memory=900TiB"])
    assert "the system may end the run" in str(choose.beyond_the_machine(stated, Needs(800 << 40)))  # pyright: ignore[reportArgumentType]
    assert choose.beyond_the_machine(stated, Needs(1)) is None  # pyright: ignore[reportArgumentType]


def test_a_run_refuses_before_it_loads(config: Path, tmp_path: Path) -> None:
    done = here("train", config, "--set", "memory=50MiB")
    assert done.code == 3 and "the smallest budget that works here is" in done.err
    assert not (tmp_path / "out").exists()


def test_a_run_keeps_within_its_memory(config: Path, tmp_path: Path) -> None:
    """In the smallest budget that is claimed."""
    told = command("train", config, "--set", "memory=50MiB", cwd=tmp_path)
    claimed = re.search(r"the smallest budget that works here is ([0-9.]+ GiB)", told.err)
    assert claimed is not None, told.err
    done = command("train", config, "--set", f"memory={claimed[1]}", cwd=tmp_path)
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan["fits"] and plan["budget_bytes"] == bytes_of(claimed[1])
    assert plan["measured_peak_bytes"] <= plan["budget_bytes"]
    assert plan["estimate"]["total_bytes"] <= plan["budget_bytes"]
    measured = plan["measured"]
    counted = sum(measured[k] for k in ("weights", "adapters", "gradients", "optimizer", "process", "rest"))
    assert counted == measured["total_bytes"] == plan["measured_peak_bytes"] and measured["rest"] > 0


def test_pins_and_exactness_are_kept(config: Path, tmp_path: Path) -> None:
    fields = ("memory=8GiB", "plan.exact=true", "plan.recompute=blocks")
    done = forked("train", config, *(part for field in fields for part in ("--set", field)), cwd=tmp_path)
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "out/plan.json").read_text())["plan"]
    assert plan["recompute"] == "blocks" and plan["weights"] in ("fp32", "bf16") and plan["optimizer_state"] == "fp32"
