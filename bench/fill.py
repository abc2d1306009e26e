"""Enqueue events for a side in the side's environment: `python -m bench.fill --side NAME --count N --seed S`."""

import argparse
from importlib import import_module

from bench.events import events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ordered", action="store_true")
    arguments = parser.parse_args()
    import_module(f"bench.sides.{arguments.side}").fill(events(arguments.count, seed=arguments.seed, ordered=arguments.ordered))


if __name__ == "__main__":
    main()
