"""What holds of every object store, shown with a real directory and a real S3 server."""

import hashlib
import io
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from evalstore.objects import object_store
from evalstore.objects.directory import DirectoryStore
from evalstore.objects.object_store import Reference, Store
from models.content import FRAME_BYTES
from models.errors import ObjectDamaged, ObjectMissing
from models.settings import Settings

MIB = 1024 * 1024
SMALL = b"a line that comes again\n" * 100
RANDOM = os.urandom(1000)
LARGE = b"".join(b"line %d of the output\n" % n for n in range(500_000))
LARGE_RANDOM = os.urandom(2 * FRAME_BYTES + 7)
PARTS = os.urandom(20 * MIB)  # in several parts on S3
CONTENTS = {"empty": b"", "small": SMALL, "random": RANDOM, "large": LARGE, "large random": LARGE_RANDOM, "in parts": PARTS}
NOWHERE = Reference(hashlib.sha256(b"never stored").hexdigest(), 12, "identity")
NOWHERE_ZST = Reference(hashlib.sha256(LARGE + b"!").hexdigest(), len(LARGE) + 1, "zstd")


class Place(NamedTuple):
    """A store, its address, and a way around it."""

    store: Store
    url: str
    environment: dict[str, str]
    stored: Callable[[str], bytes]
    overwrite: Callable[[str, bytes], Any]


@pytest.fixture
def directory(tmp_path: Path) -> Place:
    url = f"file://{tmp_path}/objects"
    store = object_store.open_store(url, Settings())

    def path(key: str) -> Path:
        return tmp_path / "objects" / key[:2] / key[2:4] / key

    return Place(store, url, {}, lambda key: path(key).read_bytes(), lambda key, data: path(key).write_bytes(data))


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Iterator[Place]:
    url, server = request.getfixturevalue("s3_url"), request.getfixturevalue("s3_server")
    client, prefix = server.client(), url.rpartition("/")[2]

    def at(key: str) -> dict[str, str]:
        return {"Bucket": server.bucket, "Key": f"{prefix}/{key}"}

    store = object_store.open_store(url, Settings(s3_endpoint_url=server.endpoint))
    environment = {**server.environment, "EVALSTORE_S3_ENDPOINT_URL": server.endpoint}
    yield Place(
        store,
        url,
        environment,
        lambda key: client.get_object(**at(key))["Body"].read(),
        lambda key, data: client.put_object(**at(key), Body=data),
    )
    store.close()
    client.close()


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def store(place: Place) -> Store:
    return place.store


def read(store: Store, reference: Reference) -> bytes:
    return b"".join(object_store.read(store, reference))


def now() -> datetime:
    return datetime.now(UTC)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_content_comes_back_whole_and_in_any_range(store: Store, content: bytes) -> None:
    reference, new = object_store.put(store, content)
    assert new
    assert (reference.sha256, reference.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert read(store, reference) == content
    edges = [n for n in (0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, len(content) - 1) if 0 <= n <= len(content)]
    ranges = [(start, stop) for start in edges for stop in [*edges, len(content)] if start <= stop]
    for _ in range(10):
        start, stop = sorted(random.choices(range(len(content) + 1), k=2))  # noqa: S311
        ranges.append((start, stop))
    for start, stop in ranges:
        assert b"".join(object_store.read_range(store, reference, start, stop)) == content[start:stop]


@pytest.mark.parametrize("given", [(-1, 5), (5, 4), (0, len(SMALL) + 1)])
def test_a_range_that_is_none_of_the_content_is_refused(store: Store, given: tuple[int, int]) -> None:
    reference, _ = object_store.put(store, SMALL)
    with pytest.raises(ValueError, match="not within"):
        object_store.read_range(store, reference, *given)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_content_is_stored_once_however_it_is_given(place: Place, content: bytes) -> None:
    parts = [content[start : start + 99_999] for start in range(0, len(content), 99_999)]
    first = object_store.put(place.store, iter(parts))
    assert first.new
    for again in (content, parts, io.BytesIO(content)):
        assert object_store.put(place.store, again) == (first.reference, False)
    found = object_store.head(place.store, first.reference)
    assert [found] == list(place.store.objects()) == [object_store.verify(place.store, first.reference)]
    assert found.size == len(place.stored(first.reference.key))


def test_threads_that_store_the_same_content_at_once_all_succeed(store: Store) -> None:
    done: list[object_store.Put] = []
    threads = [threading.Thread(target=lambda: done.append(object_store.put(store, iter([PARTS])))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4
    assert len({reference for reference, _ in done}) == 1
    assert read(store, done[0].reference) == PARTS
    assert len(list(store.objects())) == 1
    assert store.orphans(now() + timedelta(hours=1)) == []


@pytest.mark.parametrize("nowhere", [NOWHERE, NOWHERE_ZST])
def test_what_is_not_there_is_missing(store: Store, nowhere: Reference) -> None:
    object_store.put(store, SMALL)
    for act in (object_store.head, object_store.verify, object_store.read, lambda s, r: object_store.read_range(s, r, 0, 5)):
        with pytest.raises(ObjectMissing, match=nowhere.sha256):
            act(store, nowhere)
    with pytest.raises(ObjectMissing):
        store.touch(nowhere.key)
    assert not store.delete(nowhere.key, unmodified_since=now())
    store.delete(nowhere.key)


@pytest.mark.parametrize("content", [SMALL, LARGE])
def test_content_that_is_not_what_it_is_said_to_be_is_not_stored(store: Store, content: bytes) -> None:
    for given in (content, iter([content])):
        with pytest.raises(ObjectDamaged, match="expected 00000"):
            object_store.put(store, given, sha256="0" * 64)
    object_store.put(store, content, sha256=hashlib.sha256(content).hexdigest())
    assert len(list(store.objects())) == 1


def test_content_that_breaks_off_while_it_is_given_is_not_stored(store: Store) -> None:
    def parts() -> Iterator[bytes]:
        yield LARGE_RANDOM
        raise RuntimeError("the sender is gone")

    with pytest.raises(RuntimeError, match="the sender is gone"):
        object_store.put(store, parts())
    object_store.put(store, SMALL)
    assert len(list(store.objects())) == 1
    assert store.orphans(now() + timedelta(hours=1)) == []


@pytest.mark.parametrize("content", [RANDOM, SMALL, LARGE_RANDOM, PARTS], ids=len)
def test_damage_is_told_before_a_byte_of_that_frame_leaves_and_repaired_when_asked(place: Place, content: bytes) -> None:
    reference, _ = object_store.put(place.store, content)
    damaged = bytearray(place.stored(reference.key))
    at = min(FRAME_BYTES + 100, len(damaged) // 10)
    damaged[at] ^= 1
    place.overwrite(reference.key, bytes(damaged))
    got: list[bytes] = []
    with pytest.raises(ObjectDamaged, match=reference.key):
        got.extend(object_store.read(place.store, reference))
    assert content.startswith(b"".join(got))
    assert len(b"".join(got)) <= at
    with pytest.raises(ObjectDamaged):
        object_store.verify(place.store, reference)
    with pytest.raises(ObjectDamaged):
        list(object_store.read_range(place.store, reference, at, at + 1))
    if len(content) > FRAME_BYTES:  # The other frames are undamaged.
        assert (
            b"".join(object_store.read_range(place.store, reference, 2 * FRAME_BYTES, len(content)))
            == content[2 * FRAME_BYTES :]
        )
    assert object_store.put(place.store, content, replace_damaged=True) == (reference, True)
    assert read(place.store, reference) == content
    assert object_store.put(place.store, content, replace_damaged=True) == (reference, False)


@pytest.mark.parametrize("content", [RANDOM, SMALL, LARGE])
@pytest.mark.parametrize("how", ["cut", "empty", "longer", "another"])
def test_an_object_of_another_size_or_of_other_content_does_not_count_as_there(place: Place, content: bytes, how: str) -> None:
    reference, _ = object_store.put(place.store, content)
    other, _ = object_store.put(place.store, content[1:] + b"x!")
    stored = place.stored(reference.key)
    bad = {"cut": stored[:-1], "empty": b"", "longer": stored + b"0", "another": place.stored(other.key)}[how]
    place.overwrite(reference.key, bad)
    for act in (object_store.head, object_store.verify, object_store.read):
        with pytest.raises(ObjectDamaged):
            act(place.store, reference)
    assert object_store.put(place.store, content) == (reference, True)
    assert read(place.store, reference) == content


def test_an_old_object_is_made_young_by_a_touch_and_by_a_put_that_finds_it(
    store: Store, eventually: Callable[..., None]
) -> None:
    reference, _ = object_store.put(store, PARTS)
    begun = object_store.head(store, reference).modified_at

    def younger_after(act: Callable[[], object], than: datetime) -> None:
        def is_so() -> bool:  # S3 reports times in seconds.
            act()
            return object_store.head(store, reference).modified_at > than

        eventually(is_so)

    younger_after(lambda: store.touch(reference.key), begun)
    touched = object_store.head(store, reference).modified_at
    assert object_store.put(store, PARTS, touch_before=touched) == (reference, False)
    assert object_store.head(store, reference).modified_at == touched
    younger_after(lambda: object_store.put(store, PARTS, touch_before=now() + timedelta(hours=1)), touched)
    assert read(store, reference) == PARTS


def test_what_was_modified_since_is_not_deleted(store: Store) -> None:
    reference, _ = object_store.put(store, SMALL)
    assert not store.delete(reference.key, unmodified_since=now() - timedelta(hours=1))
    assert read(store, reference) == SMALL
    assert store.delete(reference.key, unmodified_since=now() + timedelta(hours=1))
    with pytest.raises(ObjectMissing):
        object_store.head(store, reference)
    assert store.orphans(now() + timedelta(hours=1)) == []


def test_objects_are_listed_in_order_from_anywhere_and_what_else_is_there_is_left_alone(place: Place) -> None:
    if isinstance(place.store, DirectoryStore):
        (place.store.folder / "ab/cd").mkdir(parents=True)
        (place.store.folder / "ab/cd/notes.txt").touch()
        (place.store.folder / "no").touch()
    else:
        place.overwrite("notes.txt", b"of the bucket's owner")
    keys = sorted(object_store.put(place.store, RANDOM + bytes([n])).reference.key for n in range(20))
    listed = list(place.store.objects())
    assert [found.key for found in listed] == keys
    assert all(found.size == len(RANDOM) + 1 and abs(found.modified_at - now()) < timedelta(minutes=5) for found in listed)
    assert [found.key for found in place.store.objects(after=keys[6])] == keys[7:]
    assert list(place.store.objects(after=keys[-1])) == []


@pytest.mark.parametrize("key", ["../../../etc/passwd", "tmp", "0" * 63, ""])
def test_nothing_is_reached_by_a_name_that_is_no_key(store: Store, key: str) -> None:
    for act in (store.delete, store.touch, lambda name: store.open(name, 0)):
        with pytest.raises(ValueError, match="not the name"):
            act(key)


MEMORY = """
import re, sys
from pathlib import Path
from models.settings import settings
from evalstore.objects import object_store as objects
store = objects.open_store(sys.argv[1], settings())
def parts(seed, count):
    import random
    for n in range(count):
        yield random.Random(seed + n).randbytes(2**20) if sys.argv[2] == "random" else b"%20d\\n" % n * 50_000
warm, _ = objects.put(store, parts(7, 1))
for chunk in objects.read(store, warm): pass
def kilobytes(name): return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage would count the process this one comes from
before = kilobytes("VmRSS")
reference, new = objects.put(store, parts(1000, 100))
assert new and reference.size >= 100 * 1_000_000
for chunk in objects.read(store, reference): pass
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["random", "text"])
def test_memory_does_not_grow_with_the_size_of_content(place: Place, kind: str) -> None:
    environment = {**os.environ, **place.environment}
    command = [sys.executable, "-c", MEMORY, place.url, kind]
    grown_kb = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert grown_kb < 32 * 1024
