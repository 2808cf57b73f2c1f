"""What the hub's errors are told as: the refusal, the network's trouble, or that nothing could be asked."""

import httpx2
import huggingface_hub.errors as hub
import pytest

from snugtune import hub as module
from snugtune.hub import hub_trouble


def led_to(error: Exception, *causes: Exception) -> Exception:
    """The error with what led to it, last first, as libraries raise them."""
    for outer, inner in zip([error, *causes], causes, strict=False):
        outer.__context__ = inner
    return error


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "http://h/x"))


UNREACHED = led_to(OSError("We couldn't connect"), hub.LocalEntryNotFoundError("look"), httpx2.ConnectError("Name not known"))
CASES = {
    "no network": (UNREACHED, "the hub cannot be reached (Name not known); check the network"),
    "no network, and no word why": (ConnectionError("Couldn't reach it (LocalEntryNotFoundError)"), "cannot be reached; check"),
    "hidden 500": (
        led_to(OSError("odd"), hub.HfHubHTTPError("500 Error\nmore", response=answer(500))),
        "broke off (500 Error); run",
    ),
    "too many asked": (hub.HfHubHTTPError("429 Slow", response=answer(429)), "run the command again"),
    "broken off": (httpx2.RemoteProtocolError("peer closed"), "the download broke off (peer closed)"),
    "forbidden": (hub.HfHubHTTPError("403", response=answer(403)), "gives no access to it (403)"),
    "no such": (hub.RepositoryNotFoundError("?", response=answer(401)), "no such dataset on the hub; check the name"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_led_to_an_error_is_told(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, told = CASES[case]
    monkeypatch.setattr(module, "is_offline_mode", lambda: False)
    said = hub_trouble(error, "dataset") or ""
    assert told in said and "\n" not in said and "Error)" not in said.replace("500 Error)", "")


def test_a_hub_that_is_switched_off_is_no_trouble_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_offline_mode", lambda: True)
    said = hub_trouble(led_to(OSError("x"), hub.LocalEntryNotFoundError("look")), "model") or ""
    assert "HF_HUB_OFFLINE" in said and "network" not in said


def test_other_errors_speak_for_themselves() -> None:
    assert hub_trouble(ValueError("Unknown split"), "dataset") is None
    assert hub_trouble(hub.RemoteEntryNotFoundError("no config.json", response=answer(404)), "model") is None
