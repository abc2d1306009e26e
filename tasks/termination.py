"""SIGTERM during a recording: the block ends with SystemExit, so that the recording sends its ending."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Final


class Termination:
    """Turns SIGTERM into `SystemExit(143)` while the main thread records.

    A handler of the application stays. The second SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self._depth = 0
        os.register_at_fork(after_in_child=self._reset_in_child)

    def enter(self) -> bool:
        """Install the handler for the first recording of the main thread. Returns whether `leave` has to be called."""
        if threading.current_thread() is not threading.main_thread():
            return False
        self._depth += 1
        if self._depth == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit)
        return True

    def leave(self) -> None:
        """Restore the default after the last recording. Another thread may call this; the next recording then restores."""
        self._depth = max(0, self._depth - 1)
        if not self._depth and threading.current_thread() is threading.main_thread():
            _restore()

    def _reset_in_child(self) -> None:
        self._depth = 0
        _restore()


def _restore() -> None:
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


TERMINATION: Final = Termination()
