"""Names of the anomaly detector. No I/O."""

from hashlib import blake2b
from typing import Final

ANOMALY_KINDS: Final = ("drift", "outlier")
ANOMALY_DIMENSIONS: Final = ("language", "submitter", "executor")
ANOMALY_METRICS: Final = ("failure_rate", "duration_ms", "memory_bytes", "output_bytes", "arrivals_per_minute")


def digest(value: str) -> str:
    """A hash that stands for the name of a group: names are free text, and may be long."""
    return blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def group_key(dimension: str, value: str) -> str:
    """A short text that stands for a group of evaluations."""
    return f"{dimension}:{digest(value)}"
