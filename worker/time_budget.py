"""How long one piece of work may keep a thread."""

import time
from collections.abc import Callable
from typing import Final

BUDGET_S: Final = 2.0


def time_budget(seconds: float = BUDGET_S) -> Callable[[], bool]:
    """Return a function that tells whether `seconds` from now are not over yet."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline
