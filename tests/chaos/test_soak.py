"""The soak, for less than a minute."""

import random
from pathlib import Path

import pytest

from tests.chaos.relay import STOCK
from tests.chaos.soak import Soak


@pytest.mark.skipif(STOCK, reason="it would take a quarter of an hour to see what is left behind")
def test_a_while_of_killing_at_random_loses_nothing_and_lets_nothing_grow(tmp_path: Path) -> None:
    seed = random.randrange(10**6)  # noqa: S311
    print(f"seed {seed}")
    numbers = Soak(tmp_path, seconds=45, rate=2000, seed=seed).run()
    print(numbers)
