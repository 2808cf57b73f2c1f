"""The report as a browser shows it: light and dark, wide and narrow, by hand and by keyboard, without scripts, on paper."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import MISSING, Browser, browser, find_chromium

from run_folders import write_run
from snugtune.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason=MISSING)]

HOSTILE = "</script></style><img src=http://127.0.0.1:9/x onerror=document.title='taken'><script>document.title='taken'</script>"
BOXES = """[...document.querySelectorAll('figure .area svg')].filter(e => e.checkVisibility())
  .map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"""
OVERVIEW = "(e => e.scrollWidth - e.clientWidth)(document.querySelector('.overview').parentElement)"
BIG = "document.querySelector('.big .area svg')"
TIP = "document.querySelector('.big .tip').innerText"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of one job, of three, of twenty, of one step, of a run full of hostile text."""
    root = tmp_path_factory.mktemp("runs")
    folders = {
        "one": write_run(root / "one", skipped=(20, 21)),
        "three": write_run(root / "three", jobs=("shop-a", "shop-b", "shop-c")),
        "twenty": write_run(root / "twenty", jobs=[f"shop-{k}" for k in range(20)], steps=120),
        "tiny": write_run(root / "tiny", steps=1),
        "hostile": write_run(root / "hostile", steps=3),
    }
    with (folders["hostile"] / "samples.jsonl").open("a") as stream:
        stream.write(json.dumps({"job": HOSTILE, "step": 0, "index": 0, "prompt": HOSTILE, "answer": HOSTILE * 20}) + "\n")
    return {name: write_report(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1010, 1280])
@pytest.mark.parametrize("name", ["one", "three", "twenty", "tiny", "hostile"])
def test_page_is_whole(shown: Browser, pages: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool) -> None:
    """No complaint, no request, nothing wider than the window, every drawing has a size, the colours are the asked ones."""
    shown.open(pages[name], width, dark)
    assert shown.complaints() == []
    assert shown.requests() == [pages[name].as_uri()]
    assert shown.ask("document.documentElement.scrollWidth") <= width
    assert shown.ask(OVERVIEW) <= 0, "the overview is read without scrolling sideways"
    boxes = shown.ask(BOXES)
    assert len(boxes) >= (2 if name == "twenty" else 5)
    assert all(w >= min(250, width / 2) and h >= 100 for w, h in boxes)
    ground = shown.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(v) for v in ground[4:-1].split(",")) < 200) is dark
    shown.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_hostile_text_does_nothing(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["hostile"])
    assert shown.ask("document.title") == "hostile: snugtune report"
    assert shown.ask("document.querySelectorAll('img').length") == 0
    assert shown.ask("document.body.textContent").count("<img src=http://127.0.0.1:9/x onerror=") >= 4


def test_values_under_the_pointer(shown: Browser, pages: dict[str, Path]) -> None:
    """Each step's own values, as in the metrics; where there are none, the nearest, with their step."""
    shown.open(pages["one"])
    box = shown.ask(f"(b => [b.left, b.top, b.width, b.height])({BIG}.getBoundingClientRect())")
    lines = {m["step"]: m for m in map(json.loads, (pages["one"].parent / "metrics.jsonl").read_text().splitlines())}
    shown.point(box[0] + box[2] * 36 / 60, box[1] + box[3] / 2)
    said = dict(part.split(": ") for part in shown.ask(TIP).splitlines()[1:])
    assert shown.ask(TIP).startswith("step 36\n")
    assert float(said["training, each step"]) == pytest.approx(lines[36]["loss"], abs=1e-3)
    assert float(said["held out"]) == pytest.approx(lines[36]["eval_loss"], abs=1e-3)
    shown.point(box[0] + box[2] * 37 / 60, box[1] + box[3] / 2)
    assert "held out" in shown.ask(TIP) and "(step 36)" in shown.ask(TIP)
    shown.point(1, 1)
    assert shown.ask("document.querySelector('.big .tip').hidden")


def test_values_by_keyboard(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["one"])
    shown.ask(f"{BIG}.focus()")
    steps = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight"):
        shown.press(key)
        steps.append(shown.ask(TIP).splitlines()[0])
    assert steps == ["step 0", "step 1", "step 0", "step 60", "step 60"]
    shown.press("Escape")
    assert shown.ask("document.querySelector('.big .tip').hidden")


def test_colours_can_be_switched(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["one"], dark=True)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = shown.ask(ground)
    assert shown.ask("document.getElementById('theme').innerText") == "light"
    shown.ask("document.getElementById('theme').click()")
    assert shown.ask(ground) != before
    shown.ask("document.getElementById('theme').click()")
    assert shown.ask(ground) == before


def test_a_link_unfolds_its_job(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["twenty"])
    assert not shown.ask("document.getElementById('job-7').open")
    shown.ask("document.querySelector('a[href=\"#job-7\"]').click()")
    assert shown.ask("new Promise(done => setTimeout(() => done(document.getElementById('job-7').open), 50))")


def test_print_holds_what_is_folded(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["twenty"])
    assert len(shown.pdf()) > 500_000  # some 15 kB of drawings a job; folded it would be a tenth
    assert not shown.ask("document.getElementById('job-7').open")


def test_page_without_scripts(shown: Browser, pages: dict[str, Path]) -> None:
    """Everything but the hover and the switch is there."""
    shown.open(pages["one"], scripts=False)
    assert shown.complaints() == []
    root = shown.call("DOM.getDocument", depth=0)["root"]["nodeId"]
    for selector, least in (("figure .area svg", 6), ("path.line", 6), ("td", 100), ("article.sample", 2)):
        assert len(shown.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]) >= least
    html = shown.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]
    assert '<button id="theme" type="button" hidden="">' in html
