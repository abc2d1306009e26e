"""The sender's spool: a folder that keeps events while Redis takes none, and the forwarder that sends them on.

`<number>.spool` are its segments. All processes append to the last one, and forward from the first one. A line is a record,

    <CRC-32 of the rest, in hex> <ms since 1970> <redis_message_id> <message>

whose message is JSON and so holds no line break: what a torn write or a bad disk left never hides where the next record begins.

Two locks (flock(2)), which go with whoever held them. `append.lock` is held for one write, never while something is sent.
`forward.lock` is held by the one forwarder, and says how far into which segment it got. A record leaves the spool only after
Redis confirmed it: what was sent and not yet noted is sent again, with the same id, which adds nothing.
"""

import fcntl
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from dramatiq.logging import get_logger

from evalstore.objects import permissions
from models.errors import RedisOutage, SpoolFull
from models.settings import DEFAULT_REDIS_NAMESPACE, Settings
from models.threads import once_at_a_time

Send = Callable[[list[str | bytes]], None]

_SEGMENT_BYTES: Final = 16 * 1024 * 1024
_BATCH_BYTES: Final = 4 * 1024 * 1024
_BATCH_RECORDS: Final = 500
_LONGEST_WAIT_S: Final = 1.0
_PROGRESS: Final = re.compile(rb"(\d{20}\.spool) (\d{20}) (\d{20})\n")

_AT: Final = re.compile(rb"[0-9a-f]{8} (\d+) ")

_logger = get_logger("tasks", "spool")


def folder_of(settings: Settings) -> Path | None:
    """Return the folder of the spool: below EVALSTORE_SPOOL_DIR with a namespace of its own, so that several may share that."""
    if settings.spool_dir is None or settings.redis_namespace == DEFAULT_REDIS_NAMESPACE:
        return settings.spool_dir
    return settings.spool_dir / f"{settings.redis_namespace}.namespace"


class SpoolRecord(NamedTuple):
    """One message as it is kept."""

    at_ms: int
    redis_id: bytes
    body: bytes

    def line(self) -> bytes:
        """It as a line of a segment."""
        rest = b"%d %b %b" % self
        return b"%08x %b\n" % (zlib.crc32(rest), rest)

    @classmethod
    def of(cls, line: bytes) -> "SpoolRecord | None":
        """The record that `line` is, or None if it is damaged. It is whole without its line break too."""
        crc, _, rest = line.removesuffix(b"\n").partition(b" ")
        if crc != b"%08x" % zlib.crc32(rest) or rest.count(b" ", 0, 100) < 2:
            return None
        at_ms, redis_id, body = rest.split(b" ", 2)
        return cls(int(at_ms), redis_id, body)


class Forwarded(NamedTuple):
    """What one run of the forwarder did."""

    sent: int
    damaged: int


class Status(NamedTuple):
    """What a spool holds: messages not yet forwarded, the age of the oldest, and damaged lines in the files moved aside."""

    messages: int
    bytes: int
    oldest_age_s: float | None
    damaged: int


class Spool:
    """The spool in `folder`, of at most `max_bytes`; any number of processes and threads may share the folder.

    `in_outage` is called with what waits whenever that cannot be forwarded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        segment_bytes: int = _SEGMENT_BYTES,
        in_outage: Callable[[Iterable[bytes]], None] = lambda _: None,
    ) -> None:
        self.folder, self.max_bytes, self.segment_bytes = folder, max_bytes, segment_bytes
        self._in_outage = in_outage
        self._forwarder: threading.Thread | None = None

    def holds(self) -> bool:
        """Whether something waits to be forwarded. A folder that cannot be looked into holds nothing."""
        with suppress(OSError):
            return any(name.endswith(".spool") for name in os.listdir(self.folder))  # noqa: PTH208 - on the way of each event
        return False

    def append(self, arguments: Sequence[str | bytes]) -> None:
        """Keep messages, given as id, body, id, body, …: on disk when this returns. All or, with SpoolFull, none.

        Raises SendRefused, and keeps none, in a signal handler that interrupted an append.
        """
        at_ms = time.time_ns() // 1_000_000
        ids_and_bodies = [part.encode() if isinstance(part, str) else part for part in arguments]
        pairs = zip(ids_and_bodies[::2], ids_and_bodies[1::2], strict=True)
        data = b"".join(SpoolRecord(at_ms, redis_id, body).line() for redis_id, body in pairs)
        try:
            if not self.folder.is_dir():
                permissions.make_folder(self.folder, parents=True)
                with suppress(OSError):  # one may write to a folder that one may not read
                    _sync(self.folder.parent)
            with self._locked_for_append():
                segment = self._write(data)
            # After the lock, so that what several processes wrote goes to the disk together.
            try:
                os.fdatasync(segment)
            finally:
                os.close(segment)
        except OSError as error:
            why = f"{error.strerror}"
            if isinstance(error, PermissionError):
                why += f": {permissions.explain(Path(error.filename or self.folder))}"
            raise SpoolFull(f"Redis is away, and the spool {self.folder} cannot be written: {why}") from error

    def forward(self, send: Send) -> Forwarded:
        """Send everything on, in the order in which it was appended, after any other forwarder is done.

        `send` takes what `append` took and raises RedisOutage; then the rest stays. Raises OSError if the folder cannot be
        read. A segment with damaged lines is kept as `<number>.bad` once the others were sent.
        """
        sent = damaged = 0
        if self.holds():
            try:
                with self._locked("forward.lock", poll_s=0.05) as progress:
                    while segments := self._segments():
                        done = self._forward_segment(segments[0][0], progress, send)
                        sent, damaged = sent + done.sent, damaged + done.damaged
            except RedisOutage:
                self._in_outage(line for _, line in self.lines())
                raise
        return Forwarded(sent, damaged)

    def keep_forwarding(self, send: Send) -> None:
        """See that a thread of this process forwards until nothing is left."""
        with _starting:
            # A thread does not survive fork(2); in the child it counts as dead.
            if self._forwarder is None or not self._forwarder.is_alive():
                self._forwarder = threading.Thread(target=self._forward_all, args=(send,), name="spool", daemon=True)
                with suppress(RuntimeError):  # the interpreter ends; the events are on disk, for another forwarder
                    self._forwarder.start()

    def status(self) -> Status:
        """What it holds. Reads all of it, and waits for nobody."""
        messages = size = damaged = 0
        oldest_ms: int | None = None
        for path, segment_bytes in self._segments():
            with suppress(FileNotFoundError), path.open("rb") as file:  # it may be forwarded meanwhile
                offset, _ = self._progress(path.name, segment_bytes)
                file.seek(offset)
                for line in file:
                    record = SpoolRecord.of(line)
                    messages += record is not None
                    oldest_ms = record.at_ms if record and oldest_ms is None else oldest_ms
                size += segment_bytes - offset
        for path in self.folder.glob("*.bad"):
            with path.open("rb") as file:
                damaged += sum(line != b"\n" and SpoolRecord.of(line) is None for line in file)
        age_s = None if oldest_ms is None else max(0.0, time.time() - oldest_ms / 1000)
        return Status(messages, size, age_s, damaged)

    def lines(self) -> Iterator[tuple[int | None, bytes]]:
        """Every line that waits, and since when, in ms since 1970; of damaged ones and those around them, None."""
        for path, size in self._segments():
            with suppress(FileNotFoundError), path.open("rb") as file:  # it may be forwarded meanwhile
                file.seek(self._progress(path.name, size)[0])
                for line in file:
                    record = SpoolRecord.of(line)
                    yield record.at_ms if record else None, line
        for path in self.folder.glob("*.bad"):
            with path.open("rb") as file:
                yield from ((None, line) for line in file)

    def waiting(self) -> tuple[int, float]:
        """How many bytes wait to be forwarded, and for how many seconds the first of them. Reads next to nothing."""
        segments, age_s = self._segments(), 0.0
        waiting = sum(size for _, size in segments)
        if segments:
            path, size = segments[0]
            with suppress(OSError), path.open("rb") as file:
                offset, _ = self._progress(path.name, size)
                waiting -= offset
                file.seek(offset)
                if found := _AT.match(file.read(64)):
                    age_s = max(0.0, time.time() - int(found[1]) / 1000)
        return waiting, age_s

    def _segments(self) -> list[tuple[Path, int]]:
        """The segments in their order, and their sizes."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".spool"):
                    with suppress(FileNotFoundError):
                        found.append((self.folder / entry.name, entry.stat().st_size))
        return sorted(found)

    def _write(self, data: bytes) -> int:
        """Append under the lock; the segment's file descriptor. What could not be written whole leaves nothing."""
        segments = self._segments()
        if sum(size for _, size in segments) + len(data) > self.max_bytes:
            raise SpoolFull(f"Redis is away, and the spool {self.folder} is full: it may hold {self.max_bytes:,} bytes")
        path, size = segments[-1] if segments else (self.folder, self.segment_bytes)
        if size >= self.segment_bytes:
            # A number that was never used before, also after all segments are gone: what forward.lock says is of one file only.
            last = int(path.stem) if segments else 0
            path = self.folder / f"{max(time.time_ns(), last + 1):020d}.spool"
        segment = permissions.create_file(path, os.O_RDWR | os.O_APPEND)
        size = os.fstat(segment).st_size
        try:
            if size and os.pread(segment, 1, size - 1) != b"\n":  # somebody died in the middle of a write
                data = b"\n" + data
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(segment, rest) :]
            if not size:
                _sync(self.folder)
        except BaseException:
            os.ftruncate(segment, size)
            if not size:
                path.unlink()
            os.close(segment)
            raise
        return segment

    def _forward_segment(self, path: Path, progress: int, send: Send) -> Forwarded:
        """Send a segment on and remove it; one that has damaged lines is moved aside."""
        sent = 0
        with path.open("rb") as file:
            offset, damaged = self._progress(path.name, os.fstat(file.fileno()).st_size)
            damaged_before = damaged
            while True:
                with self._locked_for_append():  # so nobody writes: what ends without a line break is torn, or whole
                    size = os.fstat(file.fileno()).st_size
                    if offset == size:
                        os.ftruncate(progress, 0)
                        if damaged:
                            path.rename(path.with_suffix(".bad"))
                        else:
                            path.unlink()
                        return Forwarded(sent, damaged - damaged_before)
                # After a power failure no offset may lie behind the end of the segment.
                os.fdatasync(file.fileno())
                file.seek(offset)
                while offset < size:
                    start, arguments = offset, list[str | bytes]()
                    while offset < size and offset - start < _BATCH_BYTES and len(arguments) < 2 * _BATCH_RECORDS:
                        line = file.readline(size - offset)
                        record = SpoolRecord.of(line)
                        if record:
                            arguments += [record.redis_id, record.body]
                        elif line != b"\n":
                            damaged += 1
                            _logger.warning("%s: %d bytes at %d are no record", path, len(line), offset)
                        offset += len(line)
                    if arguments:
                        send(arguments)
                        sent += len(arguments) // 2
                    with suppress(OSError):  # a full disk is no reason to stop emptying it
                        os.pwrite(progress, b"%b %020d %020d\n" % (path.name.encode(), offset, damaged), 0)

    def _progress(self, name: str, size: int) -> tuple[int, int]:
        """How far a segment is forwarded, and how many damaged lines were met so far."""
        with suppress(FileNotFoundError):
            noted = _PROGRESS.fullmatch((self.folder / "forward.lock").read_bytes())
            if noted and noted[1] == name.encode() and int(noted[2]) <= size:
                return int(noted[2]), int(noted[3])
        return 0, 0

    def _forward_all(self, send: Send) -> None:
        wait_s, failing = 0.05, False
        while True:
            try:
                sent, _ = self.forward(send)
            except (RedisOutage, OSError) as error:
                if not failing:
                    _logger.warning("events are kept in %s until they can be sent: %s", self.folder, error)
                failing = True
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                continue
            if sent:
                _logger.info("%d events were sent on from %s", sent, self.folder)
            wait_s, failing = 0.05, False
            with _starting:  # whoever appends from here on finds no thread, and starts one
                if not self.holds():
                    self._forwarder = None
                    return

    @contextmanager
    def _locked_for_append(self) -> Iterator[None]:
        """Raises SendRefused if this thread holds the lock: flock(2) would wait for ever."""
        with once_at_a_time("write to the spool"), self._locked("append.lock"):
            yield

    @contextmanager
    def _locked(self, name: str, *, poll_s: float = 0) -> Iterator[int]:
        """The lock file's descriptor. Opened anew each time, as flock(2) excludes open files, not threads.

        `poll_s`: ask again after so long, for a lock that another process may hold while it waits for Redis. Under gevent,
        flock(2) would block all greenlets of this process for that time.
        """
        lock = permissions.create_file(self.folder / name, os.O_RDWR)
        _open_locks.add(lock)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if poll_s else 0))
                    break
                except BlockingIOError:
                    time.sleep(poll_s)
            yield lock
        finally:
            _open_locks.discard(lock)
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_starting = threading.RLock()  # a signal handler may come back here
_open_locks: set[int] = set()


def _forget_locks() -> None:
    """In a forked child, where the threads that hold them are not: with its copies it would keep others out."""
    global _starting  # noqa: PLW0603
    _starting = threading.RLock()
    while _open_locks:
        os.close(_open_locks.pop())


os.register_at_fork(after_in_child=_forget_locks)
