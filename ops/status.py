"""`evalstore status`: how things stand."""

from typing import Any

from models.settings import settings
from ops.output import Format, OutputOption, show, write_json
from storage import database, dead_letters, evaluations
from tasks.broker import broker
from tasks.evaluations import QUEUE


def status(output_format: OutputOption = Format.table) -> None:
    """Show what is queued and what is stored."""
    with database.engine(settings().database_url.get_secret_value()).connect() as conn:
        by_status = evaluations.count_by_status(conn)
        kept = dead_letters.count(conn)
    queue = broker().counts(QUEUE)
    queue["dead"] += kept
    if output_format is not Format.table:
        write_json({"queue": queue, "evaluations": by_status})
        return
    rows: list[dict[str, Any]] = [{"queue": f"{QUEUE}, {state}", "messages": count} for state, count in queue.items()]
    show(rows, ["queue", "messages"], output_format)
    rows = [{"evaluations": name, "count": count} for name, count in sorted(by_status.items())]
    show(rows, ["evaluations", "count"], output_format)
