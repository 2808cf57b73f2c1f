"""Ctrl-C and SIGTERM: a flag between steps, or the end at once where there is nothing to save."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snugtune.errors import Interrupted


class Stop(threading.Event):
    """Set by the first Ctrl-C or SIGTERM. While `saves` is false there is nothing to save, and that ends the run at once."""

    saves = False


@contextmanager
def stop_flag(say: Callable[[str], None]) -> Iterator[Stop]:
    """A flag that the first Ctrl-C or SIGTERM sets; a second one interrupts at once. Needs the main thread to do so.

    Raises `Interrupted` where one comes while there is nothing to save.
    """
    flag = Stop()

    def ask(number: int, frame: object) -> None:
        if flag.is_set() or not flag.saves:
            flag.set()  # should a library swallow the exception, the first step sees it
            raise KeyboardInterrupt
        flag.set()
        say("stopping: the state is saved first (once more: stop at once, unsaved)")

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    except KeyboardInterrupt:
        if flag.saves:
            raise
        raise Interrupted("interrupted before training; nothing is lost, the same command begins again") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
