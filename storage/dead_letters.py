"""Dead letters: messages that will not be stored without an operator, kept until one removes them."""

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

from sqlalchemy import Connection

from storage import database


class Burial(NamedTuple):
    """A message that died, and of what. The same burial written twice is one."""

    id: UUID
    queue: str
    actor: str | None
    eval_id: str | None
    event_id: UUID | None
    message: bytes
    error_class: str
    error_message: str
    traceback: str
    signature: str
    attempts: int
    died_at: datetime
    host: str | None
    release: str | None


# A letter that dies again after a redrive is the same letter, with its newest cause.
_WRITE: Final = """
INSERT INTO dead_letters (id, queue, actor, eval_id, event_id, message, error_class, error_message, traceback, signature,
    deliveries, attempts, first_at, last_at, host, release)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, 1, %s, %s, %s, %s, %s)
ON CONFLICT (id) DO UPDATE SET state = 'dead', error_class = excluded.error_class, error_message = excluded.error_message,
    traceback = excluded.traceback, signature = excluded.signature, deliveries = dead_letters.deliveries + 1,
    attempts = dead_letters.attempts + excluded.attempts, last_at = excluded.last_at, host = excluded.host,
    release = excluded.release
WHERE dead_letters.last_at < excluded.last_at
"""


def write(conn: Connection, burials: Sequence[Burial]) -> None:
    """Keep these, in one transaction. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor() as cursor:
        cursor.executemany(_WRITE, [(*one[:11], one.died_at, one.died_at, one.host, one.release) for one in burials])


_VARIES: Final = re.compile(
    r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"  # UUIDs
    r"|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""  # what is quoted
    r"|0x[0-9a-fA-F]+|\d+"
)


def signature(error_class: str, error_message: str) -> str:
    """The same for errors that differ only in the ids, numbers and quoted texts they name."""
    template = _VARIES.sub("~", error_message.partition("\n")[0])[:500]
    return hashlib.sha256(f"{error_class}\n{template}".encode()).hexdigest()[:16]


_AMONG: Final = """
SELECT d.eval_id, d.event_id FROM unnest(%s::text[], %s::uuid[]) AS wanted (eval_id, event_id)
JOIN dead_letters d ON d.eval_id = wanted.eval_id AND d.event_id = wanted.event_id WHERE d.state <> 'stored'
"""


def among(conn: Connection, keys: Sequence[tuple[str, UUID]]) -> set[tuple[str, UUID]]:
    """Those of `keys` (eval_id, event_id) that are dead letters. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        cursor.execute(_AMONG, [[eval_id for eval_id, _ in keys], [event_id for _, event_id in keys]])
        return set(cursor.fetchall())


_COUNT: Final = "SELECT count(*) FROM dead_letters WHERE state <> 'stored'"


def count(conn: Connection) -> int:
    """How many there are. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin():
        ((found,),) = database.driver(conn).execute(_COUNT).fetchall()
    return int(found)
