"""What went wrong with the hub, in a person's words."""

from collections.abc import Iterator

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

_AGAIN = (408, 429)
"""Answers of a server that has no time now."""
_UNREACHED = ("ConnectError", "ConnectTimeout")
"""What httpx raises before there is a connection."""


def hub_trouble(error: BaseException, what: str) -> str | None:
    """What the hub refused or the network broke off, and what to do; `what`: model or dataset. None for other errors.

    Libraries hide it behind errors of their own: it is looked for in all that led to this one.
    """
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, RemoteEntryNotFoundError):
            return None  # the error says which file
        if status is not None and 400 <= status < 500 and status not in _AGAIN:
            return _refusal(cause, status, what)
        if status is None and type(cause).__name__ in _UNREACHED and type(cause).__module__.startswith("httpx"):
            return f"the hub cannot be reached ({_said(cause)}); check the network"
        if status is not None or type(cause).__module__.startswith("httpx"):
            return f"the download broke off ({_said(cause)}); run the command again"
    if any(isinstance(cause, (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)) for cause in _causes(error)):
        if is_offline_mode():
            return "it is not among what was downloaded before, and HF_HUB_OFFLINE keeps the hub from being asked"
        return "the hub cannot be reached; check the network"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, last first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refusal(error: BaseException, status: int, what: str) -> str:
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return f"no such {what} on the hub; check the name, or log in with 'hf auth login' if it is private"
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return f"the hub gives no access to it ({status}); if it is gated, ask for it on its page; log in with 'hf auth login'"
    return f"the hub does not have it, or refuses it ({status}); check the name"
