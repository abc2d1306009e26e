"""Remove objects that nothing refers to: after a crash, after a move, or after an upload whose event never came.

An object is removed only if it is older than the grace period, and no row, dead letter or waiting message names it. A process
that will refer to an object first renews the object's time, if the object is older than half the grace period. The stores
delete an object only if its time is unchanged since the check.

The order of the checks matters: first the age, then waiting messages, then dead letters and rows. A message that leaves the
queue during the sweep is then in a dead letter or a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Final, NamedTuple

from sqlalchemy import Connection

from evalstore.objects.frames import Listed
from evalstore.objects.object_store import Place, Store, is_same, open_store
from evalstore.storage import database
from models.errors import ObjectUnavailable
from models.settings import Settings

_BATCH: Final = 1000


@dataclass
class Collected:
    """The counts of a sweep: `objects` in all, `removed` (or to be removed), and `leftovers` of interrupted writes."""

    objects: int = 0
    removed: int = 0
    bytes: int = 0
    leftovers: int = 0
    paused: str | None = None


class Target(NamedTuple):
    """A store, and the names of this store in rows."""

    store: Store
    places: tuple[Place, ...]


def targets(settings: Settings) -> list[Target]:
    """Return the configured stores, each once."""
    own, archive = settings.object_store_url, settings.archive_url or settings.object_store_url
    if own and archive and is_same(own, archive):
        return [Target(open_store(own, settings), ("objects", "archive"))]
    urls: list[tuple[str | None, Place]] = [(own, "objects"), (archive, "archive")]
    return [Target(open_store(url, settings), (place,)) for url, place in urls if url]


def longest_wait(grace: timedelta) -> timedelta:
    """Return the limit for the age of the oldest waiting message.

    Nothing is removed beyond this age: queues are stuck, and messages in spools on other hosts are unknown.
    """
    return grace / 4


def run_once(
    conn: Connection,
    target: Target,
    now: datetime,
    grace: timedelta,
    needed: Callable[[], tuple[set[bytes], float]],
    *,
    part: tuple[int, int] = (0, 1),
    remove: bool = True,
    watch: Callable[[Listed], None] = lambda _: None,
) -> Collected:
    """Remove the objects of a store that nothing refers to.

    `needed` returns the SHA-256s that waiting messages need, and the age of the oldest message in seconds. It is called only if
    there is an object to remove. While that age exceeds a quarter of the grace period, nothing is removed. `part` (3, 48)
    limits the sweep to the fourth of 48 parts. Without `remove` the sweep only counts. `watch` receives each removed object.

    An object that the store refuses to remove, such as a locked object, is skipped. ObjectUnavailable reports it at the end.

    Raises DatabaseOutage, ObjectStoreOutage, and the errors of `needed` (run again).
    """
    done = Collected()
    before = now - grace
    waiting: set[bytes] | None = None
    refused: ObjectUnavailable | None = None
    for batch in _batches(_part_of(target.store, part)):
        done.objects += len(batch)
        old = unnamed(conn, target.places, [listed for listed in batch if listed.modified_at < before])
        if not old:
            continue
        if waiting is None:
            waiting, oldest_age_s = needed()
            if oldest_age_s > longest_wait(grace).total_seconds():
                done.paused = f"a message has waited for longer than {longest_wait(grace)}"
                return done
        old = unnamed(conn, target.places, [listed for listed in old if sha256_of(listed) not in waiting])
        for listed in old:
            try:
                is_gone = not remove or target.store.delete(listed.key, unmodified_since=before)
            except ObjectUnavailable as error:
                refused = refused or error
                continue
            if is_gone:
                done.removed, done.bytes = done.removed + 1, done.bytes + listed.size
                watch(listed)
    done.leftovers = len(target.store.orphans(before, remove=remove))
    if refused is not None:
        raise refused
    return done


def _part_of(store: Store, part: tuple[int, int]) -> Iterator[Listed]:
    """Yield the objects of one part of the names. Names are hashes, so all parts have about the same size."""
    number, of = part
    first, last = (f"{0x10000 * bound // of:04x}" for bound in (number, number + 1))
    for listed in store.objects(first if number else ""):
        if number + 1 < of and listed.key >= last:
            return
        yield listed


def _batches(objects: Iterator[Listed]) -> Iterator[list[Listed]]:
    while batch := list(islice(objects, _BATCH)):
        yield batch


_NAMED: Final = """
SELECT sha256 FROM contents WHERE sha256 = ANY(%(wanted)s) AND store IS NOT NULL AND store = ANY(%(places)s)
UNION ALL
SELECT unnest(objects) FROM dead_letters WHERE objects && %(wanted)s AND objects <> '{}' AND state <> 'stored'
"""


def unnamed(conn: Connection, places: Sequence[Place], objects: Sequence[Listed]) -> list[Listed]:
    """Return the objects that neither a row nor a dead letter names. Raises DatabaseOutage (retry)."""
    by_sha256 = {sha256_of(listed) for listed in objects}
    if not by_sha256:
        return []
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        parameters = {"wanted": list(by_sha256), "places": list(places)}
        named = {bytes(sha256) for (sha256,) in cursor.execute(_NAMED, parameters)}
    return [listed for listed in objects if sha256_of(listed) not in named]


def sha256_of(listed: Listed) -> bytes:
    return bytes.fromhex(listed.key[:64])
