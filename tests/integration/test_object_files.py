"""What holds of the object store in a directory alone: crashes, modes, and a folder that is not there."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from evalstore.objects import object_store
from evalstore.objects.directory import DirectoryStore
from evalstore.objects.frames import Encoder, _pack, read_index
from evalstore.objects.object_store import Reference
from models.content import FRAME_BYTES
from models.errors import ObjectDamaged, ObjectStoreOutage

SMALL = os.urandom(50_000)
LATER = timedelta(hours=1)
WRITER = """
import sys
from models.settings import Settings
from evalstore.objects import object_store as objects
def parts():
    while True:
        yield bytes(2**20)
objects.put(objects.open_store(sys.argv[1], Settings()), parts())
"""


def test_a_writer_killed_midway_leaves_a_temporary_file_at_worst(tmp_path: Path, eventually: Callable[..., None]) -> None:
    store = DirectoryStore(tmp_path / "objects")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, f"file://{tmp_path}/objects"])
    eventually(lambda: any(path.stat().st_size for path in tmp_path.glob("objects/tmp/*")))
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert list(store.objects()) == []
    now = datetime.now(UTC)
    assert store.orphans(now - LATER, remove=True) == []
    assert len(store.orphans(now + LATER)) == 1
    assert len(store.orphans(now + LATER, remove=True)) == 1
    assert list((tmp_path / "objects/tmp").iterdir()) == []


def test_an_object_whose_deletion_a_crash_cut_short_is_there_again_after_the_leftovers_are_removed(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects")
    reference, _ = object_store.put(store, SMALL)
    store._path(reference.key).rename(tmp_path / f"objects/tmp/{reference.key}.0123456789abcdef")
    store.orphans(datetime.now(UTC) + LATER, remove=True)
    assert b"".join(object_store.read(store, reference)) == SMALL


def test_an_object_too_new_to_be_deleted_is_not_moved(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects")
    reference, _ = object_store.put(store, SMALL)
    before = store._path(reference.key).stat().st_ctime_ns
    assert not store.delete(reference.key, unmodified_since=datetime.now(UTC) - LATER)
    assert store._path(reference.key).stat().st_ctime_ns == before


def test_an_object_that_is_put_aside_and_back_is_never_missing(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects")
    reference, _ = object_store.put(store, SMALL)
    path = store._path(reference.key)
    stop, was_read = threading.Event(), threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            object_store.verify(store, reference)
            was_read.set()

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_on)
        for _ in range(500):
            aside = tmp_path / f"objects/tmp/{reference.key}.{os.urandom(8).hex()}"
            path.rename(aside)  # As `delete` does with an object that is touched at this moment.
            store._restore(aside)
            was_read.clear()
            while not was_read.wait(0.1) and not reading.done():
                pass
            if reading.done():
                break
        stop.set()
    assert reading.exception() is None
    path.rename(aside)
    assert b"".join(object_store.read(store, reference)) == SMALL


def test_of_an_object_restore_and_one_stored_anew_meanwhile_the_newer_stays(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects")
    reference, _ = object_store.put(store, SMALL)
    path, aside = store._path(reference.key), tmp_path / f"objects/tmp/{reference.key}.0123456789abcdef"
    os.utime(path, (0, 0))
    path.rename(aside)
    now = datetime.now(UTC)
    assert store.orphans(now - LATER, remove=True) == []  # The file is recent, so its writer may still be working.
    assert object_store.put(store, SMALL, touch_before=now - LATER).new
    store._restore(aside)
    assert object_store.head(store, reference).modified_at >= now - LATER
    assert store.orphans(now + LATER) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0), (0o022, 0o50), (0o002, 0o70), (0, 0o70)])
def test_modes_follow_the_umask_and_give_others_nothing(tmp_path: Path, umask: int, mode: int) -> None:
    store = DirectoryStore(tmp_path / "objects")
    before = os.umask(umask)
    try:
        reference, _ = object_store.put(store, SMALL)
    finally:
        os.umask(before)
    found = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    first, second = reference.key[:2], reference.key[2:4]
    folders = dict.fromkeys(["objects", "objects/tmp", f"objects/{first}", f"objects/{first}/{second}"], oct(0o700 | mode))
    assert found == folders | {f"objects/{first}/{second}/{reference.key}": oct(0o600 | (mode & 0o60))}


def test_a_folder_that_is_not_there_is_an_outage_and_not_an_empty_store(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "mount" / "objects")
    for act in (
        lambda: object_store.put(store, SMALL),
        lambda: object_store.head(store, Reference("0" * 64, 5, "identity")),
        lambda: store.delete("0" * 64),
        lambda: store.touch("0" * 64),
        lambda: list(store.objects()),
    ):
        with pytest.raises(ObjectStoreOutage, match="No such file"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [50_000, 2 * FRAME_BYTES])
def test_an_object_forged_with_right_checksums_of_wrong_bytes_is_never_given_as_a_whole(tmp_path: Path, size: int) -> None:
    store = DirectoryStore(tmp_path / "objects")
    reference, _ = object_store.put(store, b"a" * size)
    encoder = Encoder(b"b" * size)
    *frames, end = [bytes(block) for block in encoder]
    assert encoder.reference is not None
    digests = read_index(encoder.reference, end, sum(map(len, frames)) + len(end)).digests
    store._path(reference.key).write_bytes(b"".join(frames) + _pack(reference, [len(frame) for frame in frames], digests))
    object_store.head(store, reference)
    got: list[bytes] = []
    with pytest.raises(ObjectDamaged, match="its content has SHA-256"):
        got.extend(object_store.read(store, reference))
    assert len(b"".join(got)) < size
    assert object_store.put(store, b"a" * size, replace_damaged=True).new
    assert b"".join(object_store.read(store, reference)) == b"a" * size
