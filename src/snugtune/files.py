"""Writing to disk so that a crash or a full disk leaves either the old or the new, never half of one."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from snugtune.errors import InputError, StorageError

LFS_POINTER = b"version https://git-lfs.github.com/"
"""What a file begins with that git left in place of a large one, until that is fetched."""
UNUSED_SECONDS = 30 * 24 * 3600.0
"""What of a cache nobody has asked for so long is deleted."""
_UNFINISHED = ".part-"
"""What the names of files and folders begin with until they are whole."""
_LOCK = ".lock"
"""The file that the process holds which is writing in a folder."""
_REPLACED = ".old-"
"""What the name of a folder begins with while the one that replaces it takes its place."""


def cache_dir() -> Path:
    """Where what can be made again is kept (converted models, tokens, traces): $SNUGTUNE_CACHE, else the user's cache folder."""
    chosen = os.environ.get("SNUGTUNE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snugtune"


def lies_in_memory(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether what is written in `folder` takes memory (tmpfs), as far as this system tells (Linux: proc(5))."""
    if not mounts.exists():
        return False
    kinds: dict[Path, str] = {}
    for line in mounts.read_text(errors="replace").splitlines():
        _, where, kind, *_ = line.split(" ")
        kinds[Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), where))] = kind
    place = folder.resolve()
    return next((kinds[p] for p in (place, *place.parents) if p in kinds), "") in ("tmpfs", "ramfs")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill the yielded folder; it becomes `target` (replacing one that was there) when the block ends well.

    Everything is on disk before the rename. On any error nothing of it stays; a refused write is a `StorageError`.
    """
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_UNFINISHED}{target.name}-"))
        yield made
        for file in (*made.rglob("*"), made):
            _sync(file)
        made.chmod(0o755)  # mkdtemp's 0700 is for secrets
        _swap(made, target)
    except Exception as error:
        if not _refused(error):
            raise
        raise StorageError(f"cannot write {target}: {reason(error)}; free space or fix the folder, then run again") from error
    finally:
        if made is not None and made.exists():
            shutil.rmtree(made, ignore_errors=True)


def _swap(made: Path, target: Path) -> None:
    """Rename `made` to `target`. One that was there is put aside first, and put back if the rename is refused."""
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file is in its place", str(target))
    aside = target.with_name(f"{_REPLACED}{target.name}")
    if not target.exists():
        os.replace(made, target)
    else:
        os.replace(target, aside)
        try:
            os.replace(made, target)
        except OSError:
            os.replace(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Undo what a killed process was still writing anywhere below `folder`: unfinished goes, replaced comes back."""
    for path in list(folder.rglob(f"{_REPLACED}*")):
        target = path.with_name(path.name.removeprefix(_REPLACED))
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, target)
    for path in list(folder.rglob(f"{_UNFINISHED}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def user_path(text: str, field: str) -> Path:
    """The path a user wrote in `field`, with `~` as the home folder. Raises `InputError`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise InputError(
            f"{field}: '{text}' is an address, not a path; download it, and give its path here (or its id on the hub)"
        )
    try:
        if "\0" in text:
            raise ValueError("it holds a NUL")
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long; no such user; a NUL
        raise InputError(f"{field}: '{text}' cannot be a path: {getattr(error, 'strerror', None) or error}") from error
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises `StorageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {reason(error)}; give another") from error


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; after the block, of what was made goes what nothing came into. Raises `StorageError`."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def claimed(folder: Path, waiting: Callable[[str], object] | None = None) -> Iterator[None]:
    """Nobody else may write in `folder` inside the block; the claim ends with the process, however that ends.

    When another process holds it, raises `InputError`; or tells `waiting` so, and waits until Ctrl-C.
    """
    lock = FileLock(folder / _LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if waiting is None:
                who = _holder(folder / _LOCK)
                raise InputError(
                    f"output: another process is training in {folder}{who}; wait for it, or give a new folder"
                ) from error
            waiting(f"another process is writing {folder}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise StorageError(f"cannot write {folder / _LOCK}: {reason(error)}") from error
    try:
        with suppress(OSError):  # a full disk is told of where it costs something
            Path(lock.lock_file).write_text(str(os.getpid()))
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: whoever waits for it looks again
        lock.release()


def _holder(lock: Path) -> str:
    """Who has it, in words, as far as that process has said so by now."""
    try:
        return f" (pid {int(lock.read_text())})"
    except (OSError, ValueError):
        return ""


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Write the yielded file; it becomes `target` when the block ends well, else nothing of it stays. Raises `StorageError`.

    It is not made to outlast a crash of the machine: for what the process alone needs.
    """
    made = target.with_name(f"{_UNFINISHED}{os.getpid()}-{target.name}")
    try:
        yield made
        os.replace(made, target)
    except Exception as error:
        if not _refused(error):
            raise
        raise StorageError(f"cannot write {target}: {reason(error)}; free space or fix the folder, then run again") from error
    finally:
        with suppress(OSError):  # it is there only if something went wrong
            made.unlink()


def scratch_folder(parent: Path, name: str) -> tuple[Path, Callable[[], None]]:
    """A new folder in `parent` for what this process alone needs, and what removes it.

    This process holds it until then, however it ends: `remove_abandoned` knows by that. Raises `StorageError`.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{_UNFINISHED}{name}-"))
            lock = FileLock(folder / _LOCK, thread_local=False)  # whichever thread removes it
            with suppress(Timeout, FileNotFoundError):  # another process took it for abandoned, before it was held
                lock.acquire(timeout=0)
                return folder, partial(_remove_held, folder, lock)
    except OSError as error:
        raise StorageError(f"cannot make a folder in {parent}: {reason(error)}; free space or give another") from error


def remove_abandoned(parent: Path, name: str) -> None:
    """Remove the scratch folders in `parent` of processes that were killed. Those of living ones are held, and stay."""
    for folder in parent.glob(f"{_UNFINISHED}{name}-*"):
        lock = FileLock(folder / _LOCK)
        with suppress(OSError):  # `Timeout` is one: it is held
            lock.acquire(timeout=0)
            _remove_held(folder, lock)


def _remove_held(folder: Path, lock: BaseFileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def link_or_copy(source: Path, target: Path) -> None:
    """The same content under another name: no space where the file system has hard links. Raises `OSError`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_whole(target: Path, content: str | bytes) -> None:
    """Write one file, all or nothing. Raises `StorageError`."""
    made = target.with_name(f"{_UNFINISHED}{os.getpid()}-{target.name}")
    try:
        made.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        _sync(made)
        os.replace(made, target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {reason(error)}") from error
    finally:
        with suppress(OSError):  # it is there only if something went wrong
            made.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `InputError` naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def code_of(folder: Path) -> str:
    """The code below a folder, as a hash: no version number that somebody could forget to raise."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def still_used(path: Path) -> None:
    """Let a file of a cache live on."""
    with suppress(OSError):  # a shared cache, or one that cannot be written
        os.utime(path)


def forget_unused(folder: Path) -> None:
    """Delete the files of a cache that nobody has asked for in `UNUSED_SECONDS`."""
    for path in folder.iterdir():
        with suppress(OSError):  # another process may be doing the same
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                path.unlink()


def is_leftover(path: Path) -> bool:
    """Whether `path` is what a killed process was still writing, or its claim."""
    return path.name == _LOCK or path.name.startswith((_UNFINISHED, _REPLACED))


def _refused(error: Exception) -> bool:
    """Whether the disk refused a write. The Rust libraries say so in exceptions of their own."""
    return isinstance(error, (OSError, SafetensorError)) or (type(error) is Exception and "(os error" in str(error))


def reason(error: Exception) -> str:
    """What the disk said, in a few words."""
    number = getattr(error, "errno", None)
    if number == errno.EFBIG:
        return "file size limit reached"
    return os.strerror(number).lower() if number else str(error)
