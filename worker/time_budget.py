"""Limit how long one piece of work may occupy a thread."""

import time
from collections.abc import Callable
from typing import Final

BUDGET_S: Final = 2.0


def time_budget(seconds: float = BUDGET_S) -> Callable[[], bool]:
    """Return a function that returns true until `seconds` have passed."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline
