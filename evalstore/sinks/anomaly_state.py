"""The state of a detector as bytes: numbers as JSON, and ADWIN's own bytes, compressed. Reading executes nothing in it.

river documents no stable form of its state, so the bytes count for one version of it.
"""

import zlib
from collections import deque
from importlib import metadata
from typing import Final

import msgspec
from river.proba import Gaussian

from evalstore.sinks.anomaly_detector import METRICS, Model, Series, adwin
from evalstore.storage.detector_state import SavedGroup
from models.errors import EvalstoreError

_FORMAT: Final = 1
_LARGEST_BYTES: Final = 1_000_000


class UnreadableState(EvalstoreError):
    """The bytes are damaged, or of another version."""


class _Series(msgspec.Struct):
    drift: bytes
    normal: tuple[float, float, float]
    count: int
    chunks: list[list[float]]
    outliers: list[int]
    reference: float | None
    left: float | None


class _Model(msgspec.Struct):
    series: dict[str, _Series]
    minute: int | None
    arrivals: int


def library() -> str:
    """The versions by which state is kept."""
    return f"river {metadata.version('river')}, format {_FORMAT}"


def dump(model: Model) -> bytes:
    """The state of a group. It names no evaluation."""
    series = {name: _dumped(one) for name, one in model.series.items()}
    return zlib.compress(msgspec.json.encode(_Model(series, model.minute, model.arrivals)), 1)


def _dumped(one: Series) -> _Series:
    normal = one.normal
    values = (float(normal.n_samples), normal.mu, normal.sigma**2)
    drift = one.drift._helper.__getstate__()  # noqa: SLF001 - ADWIN offers nothing else but pickle
    return _Series(drift, values, one.count, list(one.chunks), one.outliers, one.reference, one.left)


def check(kept_by: str) -> None:
    """Raise UnreadableState unless state was kept by the versions that are installed."""
    if kept_by != library():
        raise UnreadableState(f"it was kept by {kept_by}, and this is {library()}")


def load(saved: SavedGroup) -> Model:
    """The reverse of `dump`. Raises UnreadableState."""
    if not saved.is_whole:
        raise UnreadableState(f"the bytes of a group of dimension {saved.dimension} are damaged")
    try:
        document = zlib.decompressobj().decompress(saved.state, _LARGEST_BYTES)
        found = msgspec.json.decode(document, type=_Model)
        series = {name: _loaded(name, one) for name, one in found.series.items()}
    except (zlib.error, msgspec.DecodeError, KeyError, ValueError, TypeError) as error:
        raise UnreadableState(f"{type(error).__name__}: {error}") from error
    return Model(series, found.minute, found.arrivals, saved.used)


def _loaded(name: str, one: _Series) -> Series:
    count, mean, variance = one.normal
    drift = adwin()
    drift._helper.__setstate__(one.drift)  # noqa: SLF001 - see `_dumped`
    normal = Gaussian._from_state(count, mean, variance, ddof=1) if count else Gaussian()  # noqa: SLF001
    chunks = deque(one.chunks, maxlen=Series(METRICS[name]).chunks.maxlen)
    return Series(METRICS[name], drift, normal, one.count, chunks, one.outliers, one.reference, one.left)
