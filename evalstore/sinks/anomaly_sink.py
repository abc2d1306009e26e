"""The sink of the anomaly detector. It keeps the cursor with its state, so it counts each event once."""

import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec
from sqlalchemy import Connection, Engine

from evalstore.sinks import anomaly_state
from evalstore.sinks.anomaly_detector import Detector, Group, Sign, values_of
from evalstore.sinks.anomaly_options import AnomalyOptions
from evalstore.sinks.anomaly_state import UnreadableState
from evalstore.sinks.protocol import Batch, SinkEvent
from evalstore.storage import anomalies, database, detector_state
from evalstore.storage.anomalies import Detection
from evalstore.storage.detector_state import Known, Progress, Step, records
from models.anomalies import group_key
from models.logs import EventLogger

log = EventLogger("evalstore.sinks")

_ENDINGS: Final = frozenset(f"evaluation:{name}" for name in ("completed", "failed", "timed_out", "lost"))
# A replay that begins earlier than this is a rewind: the detector is trained anew.
_MARGIN: Final = timedelta(hours=1)
_UNKNOWN: Final = Known(None, None, None)
# A batch of so many events is written without a pause.
_LARGE: Final = 1000


class AnomalySink:
    """See `Sink` and `KeepsCursor`."""

    def __init__(self, name: str, options: AnomalyOptions, engine: Engine) -> None:
        self._name, self._options, self._engine = name, options, engine
        self._library = anomaly_state.library()
        self._owner: UUID = uuid4()
        self._progress = Progress(self._library)
        self._detector: Detector | None = None
        self._is_new = False
        self._closed = threading.Event()
        self._next_write = 0.0

    def cursor(self) -> dict[str, Any] | None:
        """Take over the detector, and return where it goes on. Raises DatabaseOutage."""
        self._owner = uuid4()
        with self._engine.connect() as conn:
            self._load(conn, detector_state.open_(conn, self._name, self._owner, self._library))
        return self._progress.cursor

    def write(self, batch: Batch) -> None:
        """Raises DatabaseOutage, and Outage where another process took over."""
        self._closed.wait(max(0.0, self._next_write - time.monotonic()))
        detector = self._detector or self._reload()
        cursor: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(batch.cursor))  # as the database gives it back
        if cursor and self._progress.cursor == cursor:
            return  # it was committed, although the answer was lost
        progress = self._begin(batch)
        detector = self._detector or detector
        try:
            detections = self._learn(detector, batch, progress)
            self._save(detector, progress._replace(cursor=cursor, latest=_latest(progress, batch)), detections)
        except BaseException:
            self._detector = None  # it is ahead of what is kept
            raise
        if len(batch) < _LARGE:
            self._next_write = time.monotonic() + self._options.pause_s

    def erase(self, eval_id: str) -> None:
        """Remove an evaluation from findings. State names none. Raises DatabaseOutage."""
        if self._detector is not None:
            self._detector.forget(eval_id)
        with self._engine.connect() as conn, database.errors(), conn.begin():
            anomalies.erase(database.driver(conn), eval_id)

    def close(self) -> None:
        """Give up the connection."""
        self._closed.set()
        self._engine.dispose()

    def _reload(self) -> Detector:
        with self._engine.connect() as conn:
            return self._load(conn, detector_state.progress(conn, self._name, self._owner))

    def _load(self, conn: Connection, found: Progress) -> Detector:
        detector, self._is_new = self._empty(), False
        groups = detector_state.groups(conn, self._name)
        try:
            anomaly_state.check(found.library)
            for one in groups:
                detector.load(Group(one.dimension, one.key), anomaly_state.load(one))
        except UnreadableState as error:
            log.warning("anomaly_state_rebuilt", sink=self._name, error=error)
            detector, self._is_new = self._empty(), True
            found = self._rebuild(found)
        self._progress, self._detector = found, detector
        return detector

    def _empty(self) -> Detector:
        return Detector(self._options.max_groups, self._options.min_evaluations)

    def _rebuild(self, found: Progress) -> Progress:
        """Where to begin to learn from the log what was learned before."""
        progress = found._replace(library=self._library, skip_until=None, silent_until=found.latest)
        if not found.cursor or found.latest is None:
            return progress
        until = found.cursor.get("replay_until") or found.latest.isoformat()
        start = (found.latest - timedelta(days=self._options.train_days)).isoformat()
        key = [start, "", start, str(UUID(int=0))]
        return progress._replace(cursor={**found.cursor, "replay_until": until, "replay_at": key})

    def _begin(self, batch: Batch) -> Progress:
        """The progress before a batch. The first batch of a replay decides what of it is known."""
        progress, before = self._progress, self._progress.cursor or {}
        is_replay = batch.cursor.get("replay_at") is not None
        is_first = is_replay and batch.cursor.get("generation") != before.get("generation")
        if not is_first or progress.latest is None:
            return progress
        if _time(batch[0]) >= progress.latest - _MARGIN:
            return progress._replace(skip_until=progress.latest)
        self._detector, self._is_new = self._empty(), True
        return progress._replace(skip_until=None, silent_until=progress.latest)

    def _learn(self, detector: Detector, batch: Batch, progress: Progress) -> list[Detection]:
        is_replay = batch.cursor.get("replay_at") is not None
        skip, silent = (progress.skip_until, progress.silent_until) if is_replay else (None, None)
        events = [event for event in batch if skip is None or _time(event) > skip]
        ended = {event.eval_id for event in events if event.type in _ENDINGS}
        with self._engine.connect() as conn:
            known = records(conn, sorted(ended)) if ended else {}
        found: dict[tuple[str, str, str, str], Detection] = {}
        for event in events:
            at = _time(event)
            for sign in _signs(detector, event, known.get(event.eval_id, _UNKNOWN), at):
                if silent is None or at > silent:
                    _add(found, sign, event, at)
        return list(found.values())

    def _save(self, detector: Detector, progress: Progress, detections: list[Detection]) -> None:
        models = detector.models
        changed = [
            detector_state.saved(group.dimension, group.key, model.used, anomaly_state.dump(model))
            for group in detector.changed
            for model in [models[group.dimension][group]]
        ]
        step = Step(changed, sorted(detector.removed), detections, self._is_new)
        with self._engine.connect() as conn:
            new = detector_state.save(conn, self._name, self._owner, progress, step)
        self._progress, self._is_new = progress, False
        detector.changed.clear()
        detector.removed.clear()
        if new:
            log.warning("anomalies_detected", sink=self._name, findings=len(new))


def _signs(detector: Detector, event: SinkEvent, known: Known, at: datetime) -> Iterator[Sign]:
    fields = event.fields
    if event.type in _ENDINGS:
        groups = {"language": known.language, "submitter": known.submitter}
        groups["executor"] = fields.get("executor_id", known.executor)
        values = values_of(fields, _output_size(fields))
        for dimension, value in groups.items():
            if value is not None:
                yield from detector.finish(dimension, value, values, event.eval_id)
        return
    names = {"evaluation:queued": ("language", "submitter"), "evaluation:started": ("executor",)}.get(event.type, ())
    for dimension in names:
        value = fields.get("executor_id" if dimension == "executor" else dimension)
        if value is not None:
            when = min(datetime.fromisoformat(fields["occurred_at"]), at).timestamp()
            yield from detector.arrive(dimension, value, when, event.eval_id)


def _add(found: dict[tuple[str, str, str, str], Detection], sign: Sign, event: SinkEvent, at: datetime) -> None:
    """Join the signs of a batch that are about the same."""
    key = (sign.dimension, sign.value, sign.metric, sign.kind)
    if (before := found.get(key)) is not None:
        ids = tuple(dict.fromkeys((*before.eval_ids, *sign.eval_ids)))
        occurrences = before.occurrences + 1
        found[key] = before._replace(observed=sign.observed, eval_ids=ids, at=max(at, before.at), occurrences=occurrences)
        return
    found[key] = Detection(
        sign.dimension,
        sign.value,
        group_key(sign.dimension, sign.value),
        sign.metric,
        sign.kind,
        sign.expected,
        sign.observed,
        sign.eval_ids,
        event.event_id,
        at,
    )


def _output_size(fields: Mapping[str, Any]) -> int | None:
    if (text := fields.get("output")) is not None:
        return len(text.encode("utf-8", "surrogatepass"))
    if (encoded := fields.get("output_b64")) is not None:
        return len(encoded) * 3 // 4
    return None if (reference := fields.get("output_ref")) is None else int(reference["size"])


def _latest(progress: Progress, batch: Batch) -> datetime:
    return max(map(_time, batch), default=progress.latest or datetime.min.replace(tzinfo=UTC))


def _time(event: SinkEvent) -> datetime:
    return datetime.fromisoformat(event.fields["recorded_at"])
