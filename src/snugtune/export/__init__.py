"""Results in other forms. A new one is a file here and a line in `EXPORTS`."""

from collections.abc import Callable
from pathlib import Path

from snugtune.errors import InputError
from snugtune.export.merged import export_merged

EXPORTS = {"merged": export_merged}


def export(
    run: Path,
    to: str,
    output: Path | None,
    adapter: str | None,
    dtype: str | None,
    say: Callable[[str], None],
    trust_remote_code: bool = False,
    base: str | None = None,
) -> Path:
    """Write the result of `run` as `to`, on top of `base`; returns the folder. Raises `InputError`, `StorageError`."""
    if to not in EXPORTS:
        raise InputError(f"--to {to}: unknown form; snugtune writes {', '.join(EXPORTS)}")
    target = output or run / to
    if target.exists():
        raise InputError(f"{target} exists already; give another --output or delete it")
    EXPORTS[to](run, target, adapter, dtype, say, trust_remote_code, base)
    return target
