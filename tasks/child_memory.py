"""Peak memory of the programs that a thread starts, by samples of /proc.

`getrusage(RUSAGE_CHILDREN)` alone is not enough. It holds the maximum over the life of the process and all its threads, and a
child that is forked starts with its parent's memory: https://man7.org/linux/man-pages/man2/getrusage.2.html
"""

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

_FIRST_SAMPLE_S: Final = 0.002
_SAMPLE_S: Final = 0.01
_MAX_SHARE: Final = 0.02  # of one processor, for the samples
_PF_FORKNOEXEC: Final = 0x40  # forked, and runs no program of its own yet: include/linux/sched.h


class Watch:
    """The peak of one thread's child processes, from `Sampler.start` to `Sampler.stop`."""

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        self.earlier = frozenset(_children_of_thread(thread_id))
        self.peak_bytes = 0
        self.is_alone = True
        self.before_bytes = _maxrss_bytes(resource.RUSAGE_CHILDREN)


class Sampler:
    """One daemon thread for all watches of a process. It sleeps while there are none."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Forget all watches. A forked child has neither the thread nor its parent's children."""
        self._watches: list[Watch] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wait_s = _FIRST_SAMPLE_S

    def start(self) -> Watch:
        """Begin to watch the programs that the calling thread starts."""
        watch = Watch(threading.get_native_id())
        with self._changed:
            self._watches.append(watch)
            if len(self._watches) > 1:
                for each in self._watches:
                    each.is_alone = False
            self._wait_s = _FIRST_SAMPLE_S
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="child-memory", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter ends, or the machine has no thread left
                    self._thread = None
            self._changed.notify()
        return watch

    def stop(self, watch: Watch) -> int | None:
        """Return the largest peak of one process in bytes. None if no program was seen.

        A program that grows shortly before its end may have had more, unless no other recording ran meanwhile.
        """
        with self._changed:
            if watch in self._watches:  # not in a forked child
                self._watches.remove(watch)
        if watch.is_alone:
            most = _maxrss_bytes(resource.RUSAGE_CHILDREN)
            if most > max(watch.before_bytes, _maxrss_bytes(resource.RUSAGE_SELF)):
                return max(most, watch.peak_bytes)
        return watch.peak_bytes or None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait(self._wait_s if self._watches else None)
                watches = list(self._watches)
            begun_at = time.thread_time()
            for thread_id in {watch.thread_id for watch in watches}:
                peaks = {child: max(map(_peak_bytes, _with_descendants(child))) for child in _children_of_thread(thread_id)}
                for watch in watches:
                    if watch.thread_id == thread_id:
                        own = (peak for child, peak in peaks.items() if child not in watch.earlier)
                        watch.peak_bytes = max(watch.peak_bytes, *own, 0)
            self._wait_s = max(min(2 * self._wait_s, _SAMPLE_S), (time.thread_time() - begun_at) / _MAX_SHARE)


def _maxrss_bytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def _children_of_thread(thread_id: int) -> list[str]:
    return _children(f"/proc/self/task/{thread_id}/children")


def _with_descendants(child: str) -> Iterator[str]:
    waiting = [child]
    while waiting:
        process_id = waiting.pop()
        yield process_id
        with suppress(OSError):
            for task in os.listdir(f"/proc/{process_id}/task"):  # noqa: PTH208 - runs often
                waiting += _children(f"/proc/{process_id}/task/{task}/children")


def _children(path: str) -> list[str]:
    with suppress(OSError), open(path, encoding="ascii") as file:  # noqa: PTH123 - runs often
        return file.read().split()
    return []


def _peak_bytes(process_id: str) -> int:
    """Return the peak resident memory of a process. 0 if it has ended, or still has the memory of its parent."""
    with suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{process_id}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            flags = int(file.read().rpartition(")")[2].split()[6])
        if not flags & _PF_FORKNOEXEC:
            with open(f"/proc/{process_id}/status", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                for line in file:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
    return 0


SAMPLER: Final = Sampler()
