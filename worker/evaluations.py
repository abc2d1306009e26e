"""What a worker does with the events it is sent."""

from functools import cache
from typing import Any

from dramatiq.middleware import CurrentMessage
from sqlalchemy import Engine

from models.errors import EventIdReused, Fault, InvalidEvent
from models.events import identified, parse
from models.settings import settings
from storage import database, evaluations, migrations


@cache
def engine() -> Engine:
    """This process's connections, once the database is known to have the right schema. Raises SchemaMismatch."""
    connections = database.engine(settings().database_url.get_secret_value())
    with connections.connect() as conn:
        migrations.check(conn)
    return connections


def store(event: Any) -> None:
    """Store one event; committed when this returns.

    Raises InvalidEvent or EventIdReused (retrying is useless), DatabaseOutage (retry).
    """
    message = CurrentMessage.get_current_message()
    given = event
    if isinstance(event, dict) and message is not None:
        given = identified(event, message.message_id, message.message_timestamp)
    parsed = parse(given, max_content_bytes=settings().max_content_bytes)
    if parsed.type == "evaluation:lost":
        raise InvalidEvent([Fault("type", "evaluation:lost is written by the system alone")])
    with engine().connect() as conn:
        stored = evaluations.store(conn, [parsed])
    if stored.outcomes == ["reused"]:
        raise EventIdReused(parsed.eval_id, parsed.event_id)
