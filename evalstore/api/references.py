"""Check content references in events: a key may refer only to content that it uploaded."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from evalstore.api.access import Caller
from evalstore.api.service import Service
from evalstore.storage import grants
from models.content import Reference
from models.errors import Fault
from models.events import CONTENT_FIELDS, Event
from models.record import EventRow

# Shares of the grace after which an object that nothing names is removed. An upload renews an object older than the first
# share. The key may use it for the second share. So the object exists for as long as it may be used.
TOUCHED_AFTER: Final = 0.25
_GRANTED_FOR: Final = 0.5
_NOT_UPLOADED: Final = (
    "not uploaded by this key lately: POST the content to /storage/content, and use the reference of the answer"
)


def granted_for(service: Service) -> timedelta:
    """Return how long a key may use what it uploaded."""
    return timedelta(days=service.settings.sweep_grace_days * _GRANTED_FOR)


def faults(service: Service, caller: Caller, events: Sequence[Event | EventRow | None]) -> list[tuple[Fault, ...]]:
    """Return, for each event, the references that the caller may not use. For threads. Raises DatabaseOutage (retry)."""
    by_event = [_references(event) if event else {} for event in events]
    wanted = {reference for references in by_event for reference in references.values()}
    if not wanted:
        return [()] * len(events)
    usable = service.with_connection(lambda conn: grants.granted(conn, caller.key_id, wanted, granted_for(service)))
    return [
        tuple(Fault(name, _NOT_UPLOADED) for name, reference in references.items() if reference not in usable)
        for references in by_event
    ]


def _references(event: Event | EventRow) -> dict[str, Reference]:
    form = "{}" if isinstance(event, EventRow) else "{}_ref"
    fields = {f"{kind}_ref": getattr(event, form.format(kind)) for kind in CONTENT_FIELDS[event.type]}
    return {name: reference for name, reference in fields.items() if isinstance(reference, Reference)}
