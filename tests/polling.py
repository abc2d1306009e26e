"""Waiting for what comes about by itself."""

import time
from collections.abc import Iterator


def looks(within_s: float) -> Iterator[None]:
    """One for each time to look, until time is up. Pauses grow: who looks all the time takes that from those it waits for."""
    give_up, pause_s = time.monotonic() + within_s, 0.01
    while True:
        yield
        if time.monotonic() > give_up:
            return
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, 0.25)
