"""The events of an evaluation in lanes, one for each attempt."""

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from markupsafe import Markup

_WIDTH: Final = 1000
_PHASES: Final = {"queued": "queued", "started": "running"}


class Lane(NamedTuple):
    """An attempt: its number, a picture of its events, and how many there are."""

    attempt: int
    picture: Markup
    events: int


def lanes(events: Sequence[Mapping[str, Any]]) -> list[Lane]:
    """Return the lanes of these events, on one scale of time."""
    if not events:
        return []
    times: list[datetime] = [event["occurred_at"] for event in events]
    first, span_s = min(times), (max(times) - min(times)).total_seconds()

    def x(at: datetime) -> float:
        return 8 + ((at - first).total_seconds() / span_s if span_s else 0.5) * (_WIDTH - 16)

    attempts: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        attempts.setdefault(event["attempt"], []).append(event)
    return [Lane(attempt, _picture(found, x), len(found)) for attempt, found in sorted(attempts.items())]


def _name(event: Mapping[str, Any]) -> str:
    name = str(event["type"]).rpartition(":")[2]
    return {"running": "started"}.get(name, name)


def _picture(events: Sequence[Mapping[str, Any]], x: Any) -> Markup:
    ordered = sorted(events, key=lambda event: (event["occurred_at"], str(event["event_id"])))
    parts = []
    for event, following in itertools.pairwise(ordered):
        begin, end = x(event["occurred_at"]), x(following["occurred_at"])
        phase = _PHASES.get(_name(event), "past")
        parts.append(
            Markup('<rect class="part-{}" x="{:.1f}" y="9" width="{:.1f}" height="6"/>').format(phase, begin, end - begin)
        )
    for event in ordered:
        name = _name(event)
        kind = _PHASES.get(name, name)
        parts.append(
            Markup('<circle class="part-{}" cx="{:.1f}" cy="12" r="6"><title>{} {}</title></circle>').format(
                kind, x(event["occurred_at"]), name.replace("_", " "), event["occurred_at"].isoformat()
            )
        )
    label = ", ".join(_name(event).replace("_", " ") for event in ordered[:20])
    return Markup(
        '<svg class="lane" viewBox="0 0 {} 24" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(_WIDTH, label, Markup("").join(parts))
