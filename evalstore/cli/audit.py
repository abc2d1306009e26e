"""`evalstore audit`: show the state of every event of a file."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from evalstore.cli.output import Format, OutputOption, failed, notice, show
from evalstore.storage import database, dead_letters, event_store, tombstones
from models.errors import InvalidEvent
from models.events import decode, identified, identity
from models.settings import Settings, settings
from tasks.broker import SendingBroker, broker
from tasks.keys import QUEUE

Key = tuple[str, UUID]
FATES = ("applied", "in flight", "dead", "erased", "missing")
_CHUNK = 10_000
_ATTEMPTS = 3


def audit(
    file: Annotated[
        Path, typer.Argument(help="JSON objects with eval_id and event_id, one per line.", exists=True, dir_okay=False)
    ],
    output_format: OutputOption = Format.table,
) -> None:
    """Show for each event of a file whether it is applied, in flight, dead, erased or missing.

    Exit status 1 if any is missing.
    """
    keys, unreadable = _read(file)
    fates = find_fates(settings(), keys)
    counts = Counter(fates.values())
    for number in unreadable:
        notice(f"line {number}: has no eval_id and event_id", "red")
    rows: list[dict[str, Any]] = [
        {"eval_id": eval_id, "event_id": str(event_id), "fate": fates[eval_id, event_id]} for eval_id, event_id in keys
    ]
    if output_format is Format.table:
        show([{"fate": fate, "events": counts[fate]} for fate in FATES], ["fate", "events"], output_format)
        for row in [row for row in rows if row["fate"] in {"missing", "dead"}][:20]:
            notice(f"{row['fate']}: {row['eval_id']} {row['event_id']}", "red")
    else:
        show(rows, [], output_format)
    if counts["missing"]:
        raise failed(f"{counts['missing']:,} of {len(keys):,} events are missing", 1)
    if unreadable:
        raise typer.Exit(4)


def _read(file: Path) -> tuple[list[Key], list[int]]:
    """Return the distinct events of a file, and the numbers of lines without an event."""
    keys: dict[Key, None] = {}
    unreadable = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            key = _key(line)
            if key is None:
                unreadable.append(number)
            else:
                keys[key] = None
    return list(keys), unreadable


def _key(line: bytes) -> Key | None:
    """Return the event of a line, or None."""
    try:
        value = decode(line)
    except InvalidEvent:
        return None
    eval_id, event_id = identity(value) if isinstance(value, dict) else (None, None)
    return (eval_id, event_id) if eval_id is not None and event_id is not None else None


def find_fates(loaded: Settings, keys: Sequence[Key]) -> dict[Key, str]:
    """Return the state of each event. Raises DatabaseOutage, RedisOutage."""
    fates = dict.fromkeys(keys, "missing")
    engine = database.connect(loaded)
    for _ in range(_ATTEMPTS):
        missing = [key for key, fate in fates.items() if fate == "missing"]
        if not missing:
            break
        # Look in Redis first: an event that leaves Redis afterwards is in the database.
        in_redis = dict(_in_redis(broker(), set(missing)))
        with engine.connect() as conn:
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                fates |= dict.fromkeys(dead_letters.among(conn, chunk), "dead")
                fates |= dict.fromkeys(event_store.applied(conn, chunk), "applied")
                gone = tombstones.erased(conn, {eval_id for eval_id, _ in chunk})
                fates |= {key: "erased" for key in chunk if key[0] in gone and fates[key] == "missing"}
        fates |= {key: fate for key, fate in in_redis.items() if fates[key] == "missing"}
    return fates


def _in_redis(queue: SendingBroker, wanted: set[Key]) -> Iterator[tuple[Key, str]]:
    """Yield the events of `wanted` that Redis holds, and their fates."""
    for state, body in queue.held(QUEUE):
        try:
            message = decode(body)
            key = identity(identified(message["args"][0], message["message_id"], message["message_timestamp"]))
        except (InvalidEvent, LookupError, TypeError, ValueError):
            continue
        if key in wanted:
            yield key, "dead" if state == "dead" else "in flight"
