"""Threads that also work at the interpreter's end, and steps that a signal handler must not enter again.

A send may run at exit, in a signal handler or in a finalizer. There, `ThreadPoolExecutor` refuses work, or waits for a lock
that the interrupted code holds.
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
    """Start a daemon thread. Returns None if no thread can start: then the caller does the work itself."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def in_threads(work: Callable[[_Item], _Result], items: Sequence[_Item], max_threads: int) -> list[_Result]:
    """Call `work` with each item, in this thread and up to `max_threads` - 1 others. Returns the results in order.

    After an error no further item starts. The error is raised when the running items have ended.
    """
    waiting = deque(enumerate(items))
    results: dict[int, _Result] = {}
    errors: list[BaseException] = []

    def work_on_queue() -> None:
        while not errors:
            try:
                number, item = waiting.popleft()
            except IndexError:
                return
            try:
                results[number] = work(item)
            except BaseException as error:  # noqa: BLE001 - the calling thread raises it again
                errors.append(error)

    threads = [thread for _ in range(min(max_threads, len(items)) - 1) if (thread := start(work_on_queue))]
    try:
        work_on_queue()
        _join(threads)
    except BaseException as error:  # raised by a signal handler
        errors.append(error)
        _join(threads)
        raise
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


class _Entered(threading.local):
    """The steps of a thread, because a signal handler runs on the stack of the thread that it interrupts."""

    def __init__(self) -> None:
        self.steps: set[str] = set()


_entered = _Entered()


def is_within(step: str) -> bool:
    """Return whether this thread is inside `step`. The caller is then a signal handler or finalizer that interrupted it."""
    return step in _entered.steps


@contextmanager
def once_at_a_time(step: str) -> Iterator[None]:
    """Mark a step that holds locks or imports modules. Raises SendRefused if this thread is in the step already."""
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
    """Raise SendRefused if `error` comes from the interpreter's end or from a partly imported module."""
    if isinstance(error, EvalstoreError):
        return
    is_ending = sys.is_finalizing() or (isinstance(error, RuntimeError) and "shutdown" in str(error))
    if is_ending:
        raise SendRefused(f"the interpreter ends, and what sending needs cannot be loaded any more: {error}") from error
    if "partially initialized module" in str(error):
        raise SendRefused(f"a module that sending needs is being imported: send the event again afterwards: {error}") from error
