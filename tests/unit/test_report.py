"""The report: what it shows is what the run's files say, escaped, thinned without losing spikes, whatever the files' state."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from run_folders import PROMPTS, write_run
from snugtune.config import to_config
from snugtune.errors import InputError, StorageError
from snugtune.report import write_report
from snugtune.report.charts import SIDE, Scale, Trace, bucketed, chart, line, number, running_mean, ticks, value_scale
from snugtune.report.facts import Series, read_facts

MIB = 2**20
POINT = re.compile(r"(-?\d+) (-?\d+)")
HOSTILE = "</script></style><img src=x onerror=alert(1)><script>alert(2)</script>\"'`{{ 7*7 }}<!--"


class Page(HTMLParser):
    """A page taken apart by a parser that is not ours."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def paths(self, kind: str) -> list[str]:
        return [
            a["d"] or "" for tag, a in self.tags if tag == "path" and "data-label" in a and kind in (a["class"] or "").split()
        ]


def report_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


# --- charts -----------------------------------------------------------------------------------------------------------

VALUES = st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(VALUES, st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_the_extremes(ys: list[float | None], count: int) -> None:
    buckets = bucketed(range(len(ys)), ys, count)
    finite = [y for y in ys if y is not None]
    assert len(buckets) <= count
    assert min((b.low for b in buckets if b.low is not None), default=None) == min(finite, default=None)
    assert max((b.high for b in buckets if b.high is not None), default=None) == max(finite, default=None)


@given(VALUES, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_series_can_be_drawn(ys: list[float | None], detail: bool, dots: bool, zero: bool) -> None:
    """Every coordinate lies in the plot, and the extremes are among them at the place of their value."""
    drawn = chart("x", [Trace("y", Series(list(range(len(ys))), ys), detail=detail, dots=dots)], 1000, zero=zero)
    finite = [y for y in ys if y is not None]
    assert (drawn is None) == (not finite)
    if drawn is None:
        return
    points = [(int(x), int(y)) for layer in drawn.layers for x, y in POINT.findall(layer.d)]
    assert all(0 <= v <= SIDE for point in points for v in point)
    assert SIDE - max(y for _, y in points) == drawn.y.place(min(finite))
    assert SIDE - min(y for _, y in points) == drawn.y.place(max(finite))


def test_values_can_be_read_back_from_a_line() -> None:
    """As the page's script does it, to a ten-thousandth of the axis."""
    ys = [3.58, 2.91, 1.26, 1.31]
    x, y = Scale(0, 3), value_scale(ys)
    back = [y.low + (y.high - y.low) * (1 - int(py) / SIDE) for _, py in POINT.findall(line(list(enumerate(ys)), x, y))]
    assert back == pytest.approx(ys, abs=(y.high - y.low) / SIDE)


def test_a_gap_breaks_the_line() -> None:
    scale = Scale(0, 3)
    assert line([(0, 0.0), (1, None), (2, 0.0), (3, 3.0)], scale, scale) == f"M0 {SIDE}h0M6667 {SIDE}L{SIDE} 0"


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, None, 6.0], 1) == [1.5, 1.5, None, 6.0]
    assert running_mean([1.0, None, 3.0], 0) == [1.0, None, 3.0]


def test_one_spike_makes_the_axis_logarithmic() -> None:
    scale = value_scale([1.0] * 50 + [1000.0])
    assert scale.log
    assert 0.4 < scale.place(31.6) / SIDE < 0.6
    assert not value_scale([1.0, 2.0, 3.0]).log
    assert not value_scale([0.0] * 9 + [1000.0]).log


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
@settings(max_examples=60, deadline=None)
def test_ticks_are_few_and_on_the_axis(low: float, width: float) -> None:
    found = ticks(Scale(low, low + width), 4)
    assert len(found) <= 6
    assert all(low - width * 1e-6 <= t <= low + width * (1 + 1e-6) for t in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0002, "0.0002"), (1.48683, "1.487"), (20000, "20,000"), (0, "0"), (2.4e-6, "2.4e-06"), (-3.5, "-3.5"), (None, "-")],
)
def test_numbers_in_words(value: float | None, text: str) -> None:
    assert number(value) == text


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_says_what_the_files_say(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12, every=4)
    page = report_of(folder)
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in lines:  # the table behind the charts
        assert all(number(entry[name]) in page.texts for name in ("loss", "eval_loss", "grad_norm", "lr") if name in entry)
    for text in (
        *PROMPTS[0],
        *PROMPTS[1],
        "data/support.jsonl:88",
        "3,120 training examples, 164 held out",
        "44.0 %",
        "2.00 GiB",
    ):
        assert text in page.text
    assert (folder / "config.yaml").read_text().strip() in " ".join(page.texts)
    assert "not finished" not in page.text
    assert "adapters/default" in page.text


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    """No address but its own anchors; only its own script may run, by hash."""
    page = report_of(write_run(tmp_path / "run", jobs=("a", "b"), steps=3))
    assert not {tag for tag, _ in page.tags} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "video",
        "audio",
        "image",
        "use",
    }
    addresses = [a[name] or "" for _, a in page.tags for name in ("src", "href", "action", "srcset", "xlink:href") if name in a]
    assert addresses and all(a.startswith("#") for a in addresses)
    assert not re.search(r"url\(|@import|https?://|fetch|XMLHttp|import\(", (tmp_path / "run/report.html").read_text())
    policy = next(a["content"] or "" for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none';")
    assert "script-src 'sha256-" in policy


def test_page_can_be_read_without_seeing_it(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path / "run", steps=9))
    assert ("html", {"lang": "en"}) in page.tags
    drawings = [a for tag, a in page.tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(drawings) == 6
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)
    assert any((a["aria-label"] or "").startswith("Loss. training: ") for a in drawings)
    levels = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == "h1" and levels.count("h1") == 1
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_nothing_of_the_run_becomes_markup(tmp_path: Path) -> None:
    """Names, samples, prompts, config, plan and data may hold anything."""
    folder = write_run(tmp_path / "run", steps=3)
    clean = report_of(folder)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"job": HOSTILE, "step": 1, "total_steps": 1, "loss": 1.0, "eval_loss": 1.0}) + "\n")
    with (folder / "samples.jsonl").open("a") as stream:
        for step, text in enumerate(("before", "between", "after")):
            sample = {"job": "default", "step": step, "index": 9, "prompt": HOSTILE + "prompt", "answer": HOSTILE + text}
            stream.write(json.dumps(sample) + "\n")
    entry = {"examples": 1, "lengths": [[1, 2, 3]], "remarks": {HOSTILE: {"count": 1, "places": [HOSTILE]}}}
    (folder / "data.json").write_text(json.dumps({HOSTILE: entry}))
    (folder / "plan.json").write_text(json.dumps({HOSTILE: [HOSTILE], "reasons": [HOSTILE]}))
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"# {HOSTILE}\n")
    page = report_of(folder)
    counts = [[tag for tag, _ in p.tags].count(kind) for p in (clean, page) for kind in ("script", "style", "img")]
    assert counts == [1, 1, 0] * 2
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]
    joined = "".join(page.texts)
    assert joined.count(HOSTILE) >= 8  # shown as it is, `{{ 7*7 }}` included
    assert all(HOSTILE + text in joined for text in ("prompt", "before", "between", "after"))


def test_one_step(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path / "run", steps=1, every=5))
    assert len(page.paths("dots")) >= 3  # a point alone would be invisible as a line


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20, finished=False)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"job": "default", "step": 21, "lo')  # just being written
    page = report_of(folder)
    assert "not finished" in page.text
    assert "at step 20 of 40" in page.text


def test_what_was_never_measured_has_no_key(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    assert "held out" in report_of(folder).texts
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps({k: v for k, v in line.items() if k != "eval_loss"}) for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert "held out" not in report_of(folder).texts


def test_skipped_steps_are_gaps_and_marks(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20, skipped=(5, 6, 20))
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"job": "default", "step": 21, "total_steps": 21, "loss": NaN, "grad_norm": Infinity, "skipped": true}\n')
    page = report_of(folder)
    assert "4 steps were skipped because the gradient was not finite: 5, 6, 20, 21" in page.text
    assert page.paths("line")[0].count("M") == 2
    assert page.paths("skips")[0].count("M") == 4
    assert "nan" not in page.text.lower().split()


def test_nothing_but_a_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    for name in ("metrics.jsonl", "plan.json", "data.json", "samples.jsonl"):
        (folder / name).unlink()
    page = report_of(folder)
    assert "No step of this job has been reported yet" in page.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "metrics.jsonl",
            'nothing\n[1]\n{"job": "default"}\n',
            "metrics.jsonl: 3 lines (the first is line 1) are broken and left out",
        ),
        ("metrics.jsonl", '{"job": "default", "step": 1}\n{"job": "default", "step": "one"}\n', "line 2 is broken and left out"),
        ("metrics.jsonl", '{"job": ["x"], "step": 1}\n{"step": 1}\n', "metrics.jsonl: 2 lines"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl: line 1 is broken"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "metrics.jsonl: line 1 is broken"),
        ("metrics.jsonl", '{"job": "default", "step": 1, "loss": 1' + "0" * 400 + "}\n", "metrics.jsonl: line 1 is broken"),
        ("plan.json", "{", "plan.json cannot be read"),
        ("plan.json", "[]", "plan.json cannot be read"),
        ("plan.json", '{"a":' * 100_000, "plan.json cannot be read"),
        ("data.json", '{"default": {"lengths": 1}}', "data.json cannot be read"),
        ("samples.jsonl", '{"job": 1}\n', "samples.jsonl: line 1 is broken"),
        ("config.yaml", "model: x\nfield_of_tomorrow: 1\n", "config.yaml cannot be used"),
    ],
)
def test_a_broken_file_is_named_and_the_rest_shown(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    heard: list[str] = []
    page = Page(write_report(folder, say=heard.append).read_text(encoding="utf-8"))
    assert len(heard) == 1 and said in heard[0], heard
    assert said in page.text
    assert "default" in page.texts


def test_a_whole_folder_has_no_problems(tmp_path: Path) -> None:
    heard: list[str] = []
    write_report(write_run(tmp_path / "run", steps=3), say=heard.append)
    assert heard == []


@pytest.mark.parametrize(
    "knobs", [{"budget_bytes": math.nan}, {"plan": {"micro_batch": None}}, {"measured_peak_bytes": -math.inf}]
)
def test_a_plan_of_nonsense_is_shown_as_far_as_it_goes(tmp_path: Path, knobs: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    (folder / "plan.json").write_text(json.dumps(knobs))
    assert "Plan" in report_of(folder).texts


# --- the head and the words -------------------------------------------------------------------------------------------


def change_config(folder: Path, **fields: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(to_config(config | fields).to_yaml())


def test_the_head_names_model_method_and_data(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    assert "base model HuggingFaceTB/SmolLM2-135M-Instruct method LoRA (r 8, lora_alpha 16) for sft data data/support.jsonl" in (
        report_of(folder).text
    )
    change_config(folder, model="demo", method={"type": "freeze", "last_blocks": 4}, data=[f"d{k}.jsonl" for k in range(6)])
    head = (
        "demo (HuggingFaceTB/SmolLM2-135M-Instruct) method freeze (last_blocks 4) for sft data d0.jsonl, d1.jsonl, d2.jsonl, d3"
    )
    assert f"{head}.jsonl and 2 more" in report_of(folder).text


def test_plan_in_words_and_units(tmp_path: Path) -> None:
    page = report_of(write_run(tmp_path / "run", steps=3))
    for words in (
        "most tokens in one forward 4 x max_seq_len",
        "activations kept",
        "logits alive at once of 512 tokens",
        "CPU threads 2",
        "measured peak memory 2.00 GiB",
    ):
        assert words in page.text
    card = page.text[page.text.index("number format of the base") : page.text.index("config.yaml, as it was resolved")]
    assert "_" not in card.replace("max_seq_len", ""), "no raw keys"


def test_changes_of_the_plan_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    plan = json.loads((folder / "plan.json").read_text())
    changes = [{"job": "default", "step": 2, "knob": "capacity", "value": 512, "cause": "memory ran out"}]
    changes += [{"job": "default", "step": 3, "knob": "recompute", "value": "blocks", "cause": "memory ran out"}]
    (folder / "plan.json").write_text(json.dumps(plan | {"changes": changes}))
    text = report_of(folder).text
    assert "changed under way default, step 2: most tokens in one forward 512 (memory ran out)" in text
    assert "default, step 3: activations computed again in backward (memory ran out)" in text


PREDICTED = {"weights": 500, "adapters": 20, "gradients": 20, "optimizer": 40, "activations": 200, "logits": 50,
             "transients": 70, "runtime": 400}  # fmt: skip
MEASURED = {"weights": 500, "adapters": 20, "gradients": 20, "optimizer": 41, "process": 350, "rest": 399}


def with_memory(folder: Path, **more: Any) -> Path:
    """The run, with what was predicted of its memory and what was measured; `more` of plan.json."""
    estimate = {k: v * MIB for k, v in PREDICTED.items()} | {"when": "head", "total_bytes": 1300 * MIB, "tokens": 1024}
    measured = {k: v * MIB for k, v in MEASURED.items()} | {"total_bytes": 1330 * MIB, "tokens": 1010, "step": 3}
    plan = json.loads((folder / "plan.json").read_text())
    told = plan | {"fits": True, "budget_bytes": 1500 * MIB, "estimate": estimate, "measured": measured} | more
    (folder / "plan.json").write_text(json.dumps(told))
    return folder


def lines_of(page: Page) -> str:
    return page.text[page.text.index("Predicted against measured") : page.text.index("Config")]


def test_predicted_and_measured_memory_stand_side_by_side(tmp_path: Path) -> None:
    page = report_of(with_memory(write_run(tmp_path / "run", steps=3)))
    told = lines_of(page)
    for text in (
        "weights 500 MiB 500 MiB",
        "optimizer state 40 MiB 41 MiB",
        "activations, logits, transients and the process 720 MiB 749 MiB",
        "logits 50 MiB",
        "the process before the base was loaded 350 MiB",
        "peak 1.27 GiB 1.30 GiB",
        "The fullest moment was predicted while the head scores, with forwards of up to 1,024 tokens;",
        "counted after step 3",
    ):
        assert text in told
    assert "estimate." not in page.text and "measured." not in page.text  # not once more, raw


def test_bars_are_shares_of_the_budget(tmp_path: Path) -> None:
    page = report_of(with_memory(write_run(tmp_path / "run", steps=3)))
    at = [i for i, (tag, a) in enumerate(page.tags) if tag == "svg" and a.get("class") == "stack"]
    assert len(at) == 2
    for start, sizes in zip(at, (PREDICTED.values(), MEASURED.values()), strict=True):
        assert "budget 1.46 GiB" in (page.tags[start][1]["aria-label"] or "")
        drawn = [a for tag, a in page.tags[start : start + 2 * len(sizes) + 2] if tag == "rect"][: len(sizes)]
        widths = sorted(int(a["width"] or 0) for a in drawn)
        assert widths == pytest.approx(sorted(SIDE * size / 1500 for size in sizes), abs=2)
        assert [int(a["x"] or 0) for a in drawn] == sorted(int(a["x"] or 0) for a in drawn)
    limits = [a["d"] for tag, a in page.tags if tag == "path" and a.get("class") == "limit" and f"v{SIDE}" in (a["d"] or "")]
    assert limits == [f"M{SIDE} 0v{SIDE}"] * 2


def test_a_peak_beyond_the_budget_is_drawn_beyond_its_line(tmp_path: Path) -> None:
    page = report_of(with_memory(write_run(tmp_path / "run", steps=3), budget_bytes=665 * MIB))
    limits = [a["d"] or "" for tag, a in page.tags if tag == "path" and a.get("class") == "limit"]
    assert f"M{SIDE // 2} 0v{SIDE}" in limits  # of 1330


def test_changes_stand_beside_the_memory(tmp_path: Path) -> None:
    change = {"job": "default", "step": 2, "knob": "capacity", "value": 512, "cause": "memory would run short (a test)"}
    page = report_of(with_memory(write_run(tmp_path / "run", steps=3), changes=[change]))
    assert "changed under way default, step 2: most tokens in one forward 512 (memory would run short (a test))" in lines_of(page)
    assert page.text.count("memory would run short") == 1


@pytest.mark.parametrize(
    "more",
    [
        {"measured": None},
        {"estimate": None},
        {"measured": {"rest": -5 * MIB, "weights": 3}, "estimate": {"when": []}},
        {"estimate": {"weights": "much", "when": HOSTILE, "tokens": math.inf}, "budget_bytes": -1},
        {"estimate": {"weights": 0}, "measured": 7, "budget_bytes": 0},
    ],
    ids=str,
)
def test_half_of_the_memory_or_nonsense_is_shown_as_far_as_it_goes(tmp_path: Path, more: dict[str, Any]) -> None:
    page = report_of(with_memory(write_run(tmp_path / "run", steps=3), **more))
    assert "Predicted against measured" in page.text


def test_an_older_plan_has_no_memory_section(tmp_path: Path) -> None:
    assert "Predicted against measured" not in report_of(write_run(tmp_path / "run", steps=3)).text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"objective": {"label_smoothing": 0.1}},
            "The training loss is taken with label smoothing of 0.1, the held-out loss without",
        ),
        ({"neftune_noise_alpha": 5}, "The training loss is taken with NEFTune noise of 5, the held-out loss without"),
        (
            {"jobs": [{"name": "a"}, {"name": "b", "neftune_noise_alpha": 5}]},
            "The training loss of b is taken with NEFTune noise",
        ),
        ({}, None),
    ],
)
def test_losses_that_cannot_be_compared(tmp_path: Path, fields: dict[str, Any], said: str | None) -> None:
    folder = write_run(tmp_path / "run", steps=6, jobs=("a", "b") if "jobs" in fields else ("default",))
    change_config(folder, **fields)
    text = report_of(folder).text
    assert said in text if said else "held-out loss without" not in text


def test_training_losses_are_means(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=60)
    losses = [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    page = report_of(folder)
    assert f"{sum(losses[:10]) / 10:.3f} → {sum(losses[-10:]) / 10:.3f}" in page.texts
    assert "Training losses are means of the first 10 and of the last 10 steps." in page.text


def test_a_long_run_is_small_and_keeps_its_spike(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20_000, every=50)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    spike = json.loads(lines[7_777]) | {"loss": 30.0}
    lines[7_777] = json.dumps(spike)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report_of(folder)
    assert (folder / "report.html").stat().st_size < 150_000
    xs = [int(x) for x, y in POINT.findall(page.paths("band")[0]) if int(y) < 0.1 * SIDE]
    assert xs == [pytest.approx(SIDE * 7_777 / 20_000, abs=SIDE / 200)]
    assert "highest 30 at step 7777" in " ".join(a.get("aria-label") or "" for _, a in page.tags)


def test_twenty_jobs_fit_in_a_megabyte(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", jobs=[f"shop-{k}" for k in range(20)], steps=400, every=5)
    page = report_of(folder)
    assert (folder / "report.html").stat().st_size < 1_000_000
    lines = [
        (a["class"], a["data-label"]) for tag, a in page.tags if tag == "path" and str(a.get("data-label")).startswith("shop-")
    ]
    assert len(lines) == 40  # in both charts of all jobs
    assert len(set(lines)) == 20 == len({look for look, _ in lines})  # each with one look, its own
    assert sum(tag == "details" and a.get("class") == "job" for tag, a in page.tags) == 20


def test_long_answers_are_cut_aloud(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    with (folder / "samples.jsonl").open("a") as stream:
        stream.write(
            json.dumps(
                {"job": "default", "step": 0, "index": 5, "prompt": [{"role": "user", "content": "Hi"}], "answer": "y" * 9_000}
            )
        )
        stream.write("\n")
    page = report_of(folder)
    assert "… (1,000 characters more)" in page.text
    assert "user: Hi" in page.text


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        write_report(write_run(tmp_path / "run", steps=1), tmp_path / "none/report.html")


def test_facts_of_a_resumed_run_are_those_of_its_metrics(tmp_path: Path) -> None:
    """After a resume the metrics file goes on where it was cut; a job's state is its last line."""
    folder = write_run(tmp_path / "run", jobs=("a", "b"), steps=6)
    facts = read_facts(folder)
    assert [(job.name, job.step, job.tokens) for job in facts.jobs] == [("a", 6, 6 * 875), ("b", 6, 6 * 875)]
    assert facts.jobs[0].series["loss"].xs == [1, 2, 3, 4, 5, 6]
    assert facts.jobs[0].series["eval_loss"].xs == [0, 6]
