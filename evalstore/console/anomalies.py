"""`/console/anomalies`: what the anomaly detector found."""

from uuid import UUID

from evalstore.api import cursors
from evalstore.api.problems import Problem, invalid
from evalstore.console import forms
from evalstore.console.pages import Answer, Done, Pages, Shown, View
from evalstore.storage import anomalies as stored
from evalstore.storage import sink_cursors
from evalstore.storage.anomalies import Anomaly, Filter
from models.anomalies import ANOMALY_DIMENSIONS, ANOMALY_KINDS, ANOMALY_METRICS
from models.errors import Fault

pages = Pages()
_LIMIT = 50
_CHOICES = {
    "state": ("open", "acknowledged"),
    "kind": ANOMALY_KINDS,
    "dimension": ANOMALY_DIMENSIONS,
    "metric": ANOMALY_METRICS,
}


@pages.page("/anomalies", "anomalies.html", "Anomalies", key="n")
async def anomalies(view: View) -> Answer:
    """List findings, the newest first."""
    given = {name: view.query(name) for name in (*_CHOICES, "value")}
    for name, allowed in _CHOICES.items():
        if given[name] is not None and given[name] not in allowed:
            raise invalid([Fault(name, f"expected {', '.join(allowed)}")])
    before = forms.position_of(view, UUID)
    rows = await view.service.run(lambda conn: stored.page(conn, Filter(**given), _LIMIT + 1, before))
    sinks = await view.service.run(sink_cursors.statuses)
    following = cursors.encode_time(rows[_LIMIT - 1].detected_at, rows[_LIMIT - 1].id) if len(rows) > _LIMIT else None
    return Shown(
        {"anomalies": [one._asdict() for one in rows[:_LIMIT]], "next": following},
        {
            "form": {name: value or "" for name, value in given.items()},
            "choices": _CHOICES,
            "is_filtered": any(given.values()),
            "is_on": any(sink.type == "anomaly" for sink in sinks),
            "first_link": view.link(cursor=None) if before else None,
            "next_link": view.link(cursor=following) if following else None,
        },
    )


async def _get(view: View) -> Anomaly:
    anomaly_id = forms.uuid_of(view, "anomaly_id", "anomaly")
    found = await view.service.run(lambda conn: stored.get(conn, anomaly_id))
    if found is None:
        raise Problem(404, "not-found", f"there is no anomaly {anomaly_id}")
    return found


@pages.page("/anomalies/{anomaly_id}", "anomaly.html", "Anomaly")
async def anomaly(view: View) -> Answer:
    """Show a finding, and the evaluations that show it."""
    return (await _get(view))._asdict()


@pages.action("/anomalies/{anomaly_id}/acknowledge")
async def acknowledge(view: View) -> Done:
    """Note that an operator has seen a finding."""
    found = await _get(view)
    intent = view.intent("anomalies ack", {"anomaly": str(found.id)})
    changed = await view.service.run(lambda conn: stored.acknowledge(conn, found.id, intent))
    return Done(f"/console/anomalies/{found.id}", "Acknowledged." if changed else "It was acknowledged before.")
