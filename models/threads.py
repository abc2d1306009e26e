"""Threads for work that goes on without them, and steps that no thread begins twice.

Senders run at the end of the interpreter, in signal handlers and in finalizers. There, `ThreadPoolExecutor` refuses work or
waits for a lock of the interrupted code.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from models.errors import EvalstoreError, SendRefused

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def start(work: Callable[..., object], *arguments: Any) -> threading.Thread | None:
    """Start a daemon thread. None if the interpreter or the system starts no more threads: do the work in this one."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def in_threads(work: Callable[[_Item], _Result], items: Sequence[_Item], most: int) -> list[_Result]:
    """Call `work` with each item, in this thread and up to `most` - 1 others. The results have the order of the items.

    After an error no further item is begun. The error is raised when all that was begun has ended.
    """
    waiting = deque(enumerate(items))
    results: dict[int, _Result] = {}
    errors: list[BaseException] = []

    def work_off() -> None:
        while not errors:
            try:
                number, item = waiting.popleft()
            except IndexError:
                return
            try:
                results[number] = work(item)
            except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                errors.append(error)

    others = [other for _ in range(min(most, len(items)) - 1) if (other := start(work_off))]
    try:
        work_off()
        _join(others)
    except BaseException as error:  # of a signal handler
        errors.append(error)
        _join(others)
        raise
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


class _Entered(threading.local):
    def __init__(self) -> None:
        self.steps: set[str] = set()


_entered = _Entered()


def is_within(step: str) -> bool:
    """Whether this thread is in that step: then a signal handler or a finalizer interrupted the step."""
    return step in _entered.steps


@contextmanager
def once_at_a_time(step: str) -> Iterator[None]:
    """Mark a step that holds locks or loads modules. Raises SendRefused if this thread is in that step already."""
    if step in _entered.steps:
        raise SendRefused(
            f"a signal handler or finalizer sent while the thread that it interrupted was to {step}: "
            "send the event again after the handler has returned"
        )
    _entered.steps.add(step)
    try:
        yield
    except Exception as error:
        raise_if_ending(error)
        raise
    finally:
        _entered.steps.discard(step)


def raise_if_ending(error: BaseException) -> None:
    """Raise SendRefused if `error` comes from the end of the interpreter, or from a module that is half imported."""
    if isinstance(error, EvalstoreError):
        return
    is_ending = sys.is_finalizing() or (isinstance(error, RuntimeError) and "shutdown" in str(error))
    if is_ending:
        raise SendRefused(f"the interpreter ends, and what sending needs cannot be loaded any more: {error}") from error
    if "partially initialized module" in str(error):
        raise SendRefused(f"a module that sending needs is being imported: send the event again afterwards: {error}") from error
