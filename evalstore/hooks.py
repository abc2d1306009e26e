"""Validators and enrichers: functions of other packages that see each event before it is stored.

A package names them as entry points of `evalstore.validators` and `evalstore.enrichers`. Each takes an event as a JSON object
(docs/reference/events.md). A validator raises InvalidEvent to refuse the event. An enricher returns an object, or None.

A hook is not part of storing: one that fails, hangs or is slow lets events pass, and is counted. docs/decisions/0043
"""

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import msgspec

from evalstore.storage.event_reader import content_fields
from evalstore.telemetry.counters import Counters
from models.content import Reference
from models.errors import Fault, InvalidEvent, InvalidSettings
from models.events import Event
from models.fields import CONTENTS
from models.logs import EventLogger
from models.plain import MAX_METADATA_BYTES, plain_metadata
from models.record import EventRow, rfc3339, to_row
from models.settings import Settings

__all__ = ["Fault", "Hooks", "InvalidEvent", "Verdict", "load", "load_or_exit", "names"]

log = EventLogger("evalstore.hooks")

_GROUPS: Final[tuple[Literal["validators", "enrichers"], ...]] = ("validators", "enrichers")
_LOG_S: Final = 60.0

_Function = Callable[[Mapping[str, Any]], Any]


@cache
def _points() -> tuple[tuple[str, metadata.EntryPoint], ...]:
    found = [(group, point) for group in _GROUPS for point in metadata.entry_points(group=f"evalstore.{group}")]
    return tuple(sorted(found, key=lambda one: (one[0] == "enrichers", one[1].name)))


def names() -> list[str]:
    """Return the hooks that are installed, as `validators.NAME` and `enrichers.NAME`, in the order of their calls."""
    return list(dict.fromkeys(f"{group}.{point.name}" for group, point in _points()))


class Verdict(NamedTuple):
    """The results of the hooks, by the positions of the events."""

    refused: dict[int, InvalidEvent]
    enrichments: dict[int, dict[str, Any]]


class Limits(NamedTuple):
    """A hook that takes longer than `timeout_s` for a batch is off for `retry_s`."""

    timeout_s: float
    retry_s: float


class _Hook:
    """A function of another package, with its breaker. Any thread may use it."""

    def __init__(self, name: str, function: _Function, limits: Limits, counters: Counters) -> None:
        self.name, self._function, self._limits, self._counters = name, function, limits, counters
        self._lock = threading.Lock()
        self._off_until: float | None = None
        self._stuck: threading.Thread | None = None
        self._logged = -_LOG_S

    def call(self, documents: Mapping[int, Mapping[str, Any]]) -> dict[int, Any]:
        """Return the result for each event, by position, or the exception. Events that the hook did not see are missing.

        Blocks for `timeout_s` at most: the thread of a call that takes longer goes on alone, and its results are dropped.
        """
        results: dict[int, Any] = {}
        if self._may_try():
            thread = threading.Thread(target=self._call_all, args=(documents, results), name=self.name, daemon=True)
            began = time.perf_counter()
            thread.start()
            thread.join(self._limits.timeout_s)
            results = dict(results)  # the thread may go on
            took_s = time.perf_counter() - began
            self._counters.observe_all(
                "evalstore_hook_duration_seconds", self.name, values=[took_s / len(documents)], times=len(documents)
            )
            self._set_state(thread if thread.is_alive() else None)
        self._count("skipped", len(documents) - len(results))
        return results

    def _call_all(self, documents: Mapping[int, Mapping[str, Any]], results: dict[int, Any]) -> None:
        for at, document in documents.items():
            try:
                result = self._function(MappingProxyType(document))
            except Exception as error:  # noqa: BLE001 - other people's code; the caller counts and logs the error
                result = error
            results[at] = result

    def _may_try(self) -> bool:
        with self._lock:
            if self._off_until is None:
                return True
            is_stuck = self._stuck is not None and self._stuck.is_alive()
            if is_stuck or time.monotonic() < self._off_until:
                return False
            self._off_until = time.monotonic() + self._limits.retry_s  # this call alone tries
            return True

    def _set_state(self, stuck: threading.Thread | None) -> None:
        with self._lock:
            was_off = self._off_until is not None
            self._stuck = stuck or self._stuck
            self._off_until = time.monotonic() + self._limits.retry_s if stuck else None
        if stuck and not was_off:
            log.error("hook_off", hook=self.name, seconds=self._limits.timeout_s, retry_s=self._limits.retry_s)
        elif was_off and not stuck:
            log.warning("hook_back", hook=self.name)
        if bool(stuck) != was_off:
            self._counters.set("evalstore_hook_off", self.name, to=bool(stuck))

    def count(self, passed: int, refused: int, failures: Sequence[Exception]) -> None:
        """Count outcomes. Log the last failure, once a minute."""
        self._count("passed", passed)
        self._count("refused", refused)
        self._count("failed", len(failures))
        if failures and time.monotonic() - self._logged > _LOG_S:
            self._logged = time.monotonic()
            log.warning("hook_failed", hook=self.name, events=len(failures), error=failures[-1])

    def _count(self, outcome: str, number: int) -> None:
        if number:
            self._counters.add("evalstore_hook_events_total", self.name, outcome, by=number)


class Hooks:
    """The hooks of this process, in the order of their names. False if there are none: then do not call it."""

    def __init__(self, found: Iterable[tuple[str, _Function]], limits: Limits, counters: Counters) -> None:
        hooks = [_Hook(name, function, limits, counters) for name, function in found]
        self._validators = [hook for hook in hooks if hook.name.startswith("validators.")]
        self._enrichers = [hook for hook in hooks if not hook.name.startswith("validators.")]
        self.longest_s = limits.timeout_s * len(hooks)

    def __bool__(self) -> bool:
        return bool(self._validators or self._enrichers)

    def run(self, events: Sequence[Event | EventRow]) -> Verdict:
        """Call every hook with the events. Blocks for `longest_s` at most. An event that is refused is not enriched."""
        documents = {at: as_json(event) for at, event in enumerate(events)}
        refused: dict[int, InvalidEvent] = {}
        for hook in self._validators:
            refused |= _validate(hook, documents) if documents else {}
            documents = {at: document for at, document in documents.items() if at not in refused}
        enrichments: dict[int, dict[str, Any]] = {}
        for hook in self._enrichers if documents else ():
            for at, added in _enrich(hook, documents).items():
                merged = enrichments.get(at, {}) | added
                enrichments[at] = merged if len(msgspec.json.encode(merged)) <= MAX_METADATA_BYTES else added
        return Verdict(refused, enrichments)

    def check(self, event: Event | EventRow) -> dict[str, Any] | None:
        """Return the enrichment of one event. Raises InvalidEvent if a validator refuses the event."""
        verdict = self.run([event])
        if verdict.refused:
            raise verdict.refused[0]
        return verdict.enrichments.get(0)


def _validate(hook: _Hook, documents: Mapping[int, Mapping[str, Any]]) -> dict[int, InvalidEvent]:
    results = hook.call(documents)
    refused = {at: error for at, error in results.items() if isinstance(error, InvalidEvent)}
    failures = [error for error in results.values() if isinstance(error, Exception) and not isinstance(error, InvalidEvent)]
    hook.count(len(results) - len(refused) - len(failures), len(refused), failures)
    return refused


def _enrich(hook: _Hook, documents: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    enrichments: dict[int, dict[str, Any]] = {}
    failures: list[Exception] = []
    results = hook.call(documents)
    for at, result in results.items():
        try:
            if added := _object(result):
                enrichments[at] = added
        except Exception as error:  # noqa: BLE001 - an enricher's failure costs the enrichment alone
            failures.append(error)
    hook.count(len(results) - len(failures), 0, failures)
    return enrichments


def _object(result: Any) -> dict[str, Any]:
    if isinstance(result, Exception):
        raise result
    if result is not None and not isinstance(result, dict):
        raise TypeError(f"an enricher returns an object or None, not {type(result).__name__}")
    return plain_metadata(result or {})


def as_json(event: Event | EventRow) -> dict[str, Any]:
    """Return an event as the JSON object that a sender gives. Changes of it change no event."""
    row = event if isinstance(event, EventRow) else to_row(event)
    extra = msgspec.json.decode(row.extra) if row.extra else {}
    fields = {name: value for name, value in row._asdict().items() if value is not None and name not in {*CONTENTS, "extra"}}
    fields |= {"event_id": str(row.event_id), "occurred_at": rfc3339(row.occurred_at)}
    if row.metadata is not None:
        fields["metadata"] = copy.deepcopy(row.metadata)
    for kind in CONTENTS:
        data: bytes | Reference | None = getattr(row, kind)
        if isinstance(data, Reference):
            fields[f"{kind}_ref"] = {"sha256": data.sha256, "size": data.size, "encoding": data.encoding}
        elif data is not None:
            fields |= content_fields(kind, data)
    return {**extra, **fields}


def load(settings: Settings, counters: Counters) -> Hooks:
    """Load all hooks that are installed. Raises InvalidSettings, which names each that cannot be loaded."""
    found: dict[str, _Function] = {}
    faults = []
    for group, point in _points():
        name = f"{group}.{point.name}"
        if name in found:
            faults.append(f"evalstore.{name}: two packages have an entry point of this name")
        try:
            found[name] = point.load()
        except Exception as error:  # noqa: BLE001 - other people's code; the process does not start without it
            faults.append(f"evalstore.{name}: {point.value} cannot be loaded: {type(error).__name__}: {error}")
    if faults:
        raise InvalidSettings("\n".join(faults))
    return Hooks(found.items(), Limits(settings.hook_timeout_s, settings.hook_retry_s), counters)


def load_or_exit(settings: Settings, counters: Counters) -> Hooks:
    """Do as `load` does, or print each fault to stderr and exit with status 2."""
    try:
        return load(settings, counters)
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        sys.exit(2)
