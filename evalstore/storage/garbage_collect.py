"""Removing objects that nothing refers to: what a crash left in the archive, what moved from there, what no event ever named.

An object goes only if it is older than the grace and named by no row, no dead letter, and no message that waits. Whoever is
about to refer to an object makes it young before, if it is older than half the grace; and the stores delete only what is
still as old as it was when it was judged. So the order matters: first age, then what waits, then dead letters and rows, where a
message ends that waited a moment ago.
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
    """What a sweep saw: `objects` in all, `removed` of them (or to be removed), and its `leftovers` of writes broken off."""

    objects: int = 0
    removed: int = 0
    bytes: int = 0
    leftovers: int = 0
    paused: str | None = None


class Target(NamedTuple):
    """A store, and what rows call it."""

    store: Store
    places: tuple[Place, ...]


def targets(settings: Settings) -> list[Target]:
    """The stores that there are, each once."""
    own, archive = settings.object_store_url, settings.archive_url or settings.object_store_url
    if own and archive and is_same(own, archive):
        return [Target(open_store(own, settings), ("objects", "archive"))]
    found: list[tuple[str | None, Place]] = [(own, "objects"), (archive, "archive")]
    return [Target(open_store(url, settings), (place,)) for url, place in found if url]


def longest_wait(grace: timedelta) -> timedelta:
    """While a message has waited for longer, nothing is removed: something is wrong, and spools elsewhere are not seen."""
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
    """Remove what nothing refers to from a store.

    `needed` gives the SHA-256 of what waiting messages need, and the age of the oldest one in seconds; it is called only if
    there is something to remove. While that age is above a quarter of the grace, nothing is removed. `part` (3, 48) looks at
    the fourth of 48 parts alone. Without `remove` this only looks. `watch` is given each object that goes.

    An object that the store refuses to remove, such as a locked one, is passed over. ObjectUnavailable reports it at the end.

    Raises DatabaseOutage, ObjectStoreOutage, and what `needed` raises (run again).
    """
    done = Collected()
    before = now - grace
    waiting: set[bytes] | None = None
    refused: ObjectUnavailable | None = None
    for batch in _batches(_part_of(target.store, part)):
        done.objects += len(batch)
        old = unnamed(conn, target.places, [one for one in batch if one.modified_at < before])
        if not old:
            continue
        if waiting is None:
            waiting, oldest_age_s = needed()
            if oldest_age_s > longest_wait(grace).total_seconds():
                done.paused = f"a message has waited for longer than {longest_wait(grace)}"
                return done
        old = unnamed(conn, target.places, [one for one in old if sha256_of(one) not in waiting])
        for one in old:
            try:
                is_gone = not remove or target.store.delete(one.key, unmodified_since=before)
            except ObjectUnavailable as error:
                refused = refused or error
                continue
            if is_gone:
                done.removed, done.bytes = done.removed + 1, done.bytes + one.size
                watch(one)
    done.leftovers = len(target.store.orphans(before, remove=remove))
    if refused is not None:
        raise refused
    return done


def _part_of(store: Store, part: tuple[int, int]) -> Iterator[Listed]:
    """The objects whose names lie in a part of all names: they are hashes, so that parts are of a size."""
    number, of = part
    first, last = (f"{0x10000 * bound // of:04x}" for bound in (number, number + 1))
    for one in store.objects(first if number else ""):
        if number + 1 < of and one.key >= last:
            return
        yield one


def _batches(found: Iterator[Listed]) -> Iterator[list[Listed]]:
    while batch := list(islice(found, _BATCH)):
        yield batch


_NAMED: Final = """
SELECT sha256 FROM contents WHERE sha256 = ANY(%(wanted)s) AND store IS NOT NULL AND store = ANY(%(places)s)
UNION ALL
SELECT unnest(objects) FROM dead_letters WHERE objects && %(wanted)s AND objects <> '{}' AND state <> 'stored'
"""


def unnamed(conn: Connection, places: Sequence[Place], found: Sequence[Listed]) -> list[Listed]:
    """Those that neither a row nor a dead letter names. Raises DatabaseOutage (retry)."""
    by_sha256 = {sha256_of(one) for one in found}
    if not by_sha256:
        return []
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        given = {"wanted": list(by_sha256), "places": list(places)}
        named = {bytes(sha256) for (sha256,) in cursor.execute(_NAMED, given)}
    return [one for one in found if sha256_of(one) not in named]


def sha256_of(one: Listed) -> bytes:
    return bytes.fromhex(one.key[:64])
