"""The spool of senders: a folder that keeps events during an outage of Redis, and the forwarder that sends them afterwards.

The spool consists of segments `<number>.spool`. All processes append to the last segment and forward from the first. Each line
of a segment is a record:

    <CRC-32 of the rest, in hex> <ms since 1970> <redis_message_id> <message>

The message is JSON without line breaks. So the next record can be found after a torn write or a damaged sector.

The two flock(2) locks end with their process. `append.lock` is held during a write, never during a send. `forward.lock` is held
by the one forwarder, and contains its position. A record leaves the spool after Redis confirmed it. After a crash some records
are sent again with the same id, which adds nothing.
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
_MAX_RETRY_S: Final = 1.0
_PROGRESS: Final = re.compile(rb"(\d{20}\.spool) (\d{20}) (\d{20})\n")

_RECORD_TIME: Final = re.compile(rb"[0-9a-f]{8} (\d+) ")

_logger = get_logger("tasks", "spool")


def folder_of(settings: Settings) -> Path | None:
    """Return the spool's folder, or None. Each namespace but the default has a subfolder of EVALSTORE_SPOOL_DIR."""
    if settings.spool_dir is None or settings.redis_namespace == DEFAULT_REDIS_NAMESPACE:
        return settings.spool_dir
    return settings.spool_dir / f"{settings.redis_namespace}.namespace"


class SpoolRecord(NamedTuple):
    """One message in the spool."""

    at_ms: int
    redis_id: bytes
    body: bytes

    def line(self) -> bytes:
        """Encode the record as a line of a segment."""
        rest = b"%d %b %b" % self
        return b"%08x %b\n" % (zlib.crc32(rest), rest)

    @classmethod
    def parse(cls, line: bytes) -> "SpoolRecord | None":
        """Decode a line, or return None if it is damaged. A record without its line break is whole."""
        crc, _, rest = line.removesuffix(b"\n").partition(b" ")
        if crc != b"%08x" % zlib.crc32(rest) or rest.count(b" ", 0, 100) < 2:
            return None
        at_ms, redis_id, body = rest.split(b" ", 2)
        return cls(int(at_ms), redis_id, body)


class Forwarded(NamedTuple):
    """The counts of one run of the forwarder: messages sent, and damaged lines."""

    sent: int
    damaged: int


class Status(NamedTuple):
    """Messages not yet forwarded, the age of the oldest, and the damaged lines in `.bad` files."""

    messages: int
    bytes: int
    oldest_age_s: float | None
    damaged: int


class Spool:
    """A spool of at most `max_bytes` in `folder`, which processes and threads may share.

    `on_outage` is called with the waiting lines when they cannot be forwarded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        segment_bytes: int = _SEGMENT_BYTES,
        on_outage: Callable[[Iterable[bytes]], None] = lambda _: None,
    ) -> None:
        self.folder, self.max_bytes, self.segment_bytes = folder, max_bytes, segment_bytes
        self._on_outage = on_outage
        self._forwarder: threading.Thread | None = None
        self._lock = threading.RLock()  # reentrant, because a signal handler may send

    def holds(self) -> bool:
        """Return whether a message waits to be forwarded. False if the folder cannot be read."""
        with suppress(OSError):
            return any(name.endswith(".spool") for name in os.listdir(self.folder))  # noqa: PTH208 - runs for each event
        return False

    def append(self, arguments: Sequence[str | bytes]) -> None:
        """Append messages, as id, body, id, body, …, and return once they are on disk.

        Raises SpoolFull, or SendRefused in a signal handler that interrupted an append. Then none is appended.
        """
        at_ms = time.time_ns() // 1_000_000
        ids_and_bodies = [part.encode() if isinstance(part, str) else part for part in arguments]
        pairs = zip(ids_and_bodies[::2], ids_and_bodies[1::2], strict=True)
        data = b"".join(SpoolRecord(at_ms, redis_id, body).line() for redis_id, body in pairs)
        try:
            if not self.folder.is_dir():
                permissions.make_folder(self.folder, parents=True)
                with suppress(OSError):  # a folder may be writable but not readable
                    _sync(self.folder.parent)
            with self._locked_for_append():
                segment = self._write(data)
            # Sync outside the lock, so that several processes share one disk write.
            try:
                os.fdatasync(segment)
            finally:
                os.close(segment)
        except OSError as error:
            reason = f"{error.strerror}"
            if isinstance(error, PermissionError):
                reason += f": {permissions.explain(Path(error.filename or self.folder))}"
            raise SpoolFull(f"Redis is away, and the spool {self.folder} cannot be written: {reason}") from error

    def forward(self, send: Send) -> Forwarded:
        """Send all messages in the order of `append`. Waits for another forwarder to end.

        `send` takes what `append` takes. If it raises RedisOutage, the rest stays. A segment with damaged lines becomes
        `<number>.bad` after its other lines are sent. Raises OSError if the folder cannot be read.
        """
        sent = damaged = 0
        if self.holds():
            try:
                with self._locked("forward.lock", poll_s=0.05) as progress:
                    while segments := self._segments():
                        done = self._forward_segment(segments[0][0], progress, send)
                        sent, damaged = sent + done.sent, damaged + done.damaged
            except RedisOutage:
                self._on_outage(line for _, line in self.lines())
                raise
        return Forwarded(sent, damaged)

    def keep_forwarding(self, send: Send) -> None:
        """Start a thread that forwards until the spool is empty, unless one runs."""
        with self._lock:
            # After fork(2), the parent's thread is not alive in the child.
            if self._forwarder is None or not self._forwarder.is_alive():
                self._forwarder = threading.Thread(target=self._forward_all, args=(send,), name="spool", daemon=True)
                with suppress(RuntimeError):  # the interpreter ends; another process will forward
                    self._forwarder.start()

    def status(self) -> Status:
        """Count messages and damaged lines. Reads the whole spool, and takes no lock."""
        messages = size = damaged = 0
        oldest_ms: int | None = None
        for path, segment_bytes in self._segments():
            with suppress(FileNotFoundError), path.open("rb") as file:  # The forwarder has removed the segment.
                offset, _ = self._progress(path.name, segment_bytes)
                file.seek(offset)
                for line in file:
                    record = SpoolRecord.parse(line)
                    messages += record is not None
                    oldest_ms = record.at_ms if record and oldest_ms is None else oldest_ms
                size += segment_bytes - offset
        for path in self.folder.glob("*.bad"):
            with path.open("rb") as file:
                damaged += sum(line != b"\n" and SpoolRecord.parse(line) is None for line in file)
        age_s = None if oldest_ms is None else max(0.0, time.time() - oldest_ms / 1000)
        return Status(messages, size, age_s, damaged)

    def lines(self) -> Iterator[tuple[int | None, bytes]]:
        """Yield every line and its time in ms since 1970. The time is None for damaged lines and for `.bad` files."""
        for path, size in self._segments():
            with suppress(FileNotFoundError), path.open("rb") as file:  # The forwarder has removed the segment.
                file.seek(self._progress(path.name, size)[0])
                for line in file:
                    record = SpoolRecord.parse(line)
                    yield record.at_ms if record else None, line
        for path in self.folder.glob("*.bad"):
            with path.open("rb") as file:
                yield from ((None, line) for line in file)

    def waiting(self) -> tuple[int, float]:
        """Return the bytes that wait, and the age of the first in seconds. Reads only the first record."""
        segments, age_s = self._segments(), 0.0
        waiting_bytes = sum(size for _, size in segments)
        if segments:
            path, size = segments[0]
            with suppress(OSError), path.open("rb") as file:
                offset, _ = self._progress(path.name, size)
                waiting_bytes -= offset
                file.seek(offset)
                if match := _RECORD_TIME.match(file.read(64)):
                    age_s = max(0.0, time.time() - int(match[1]) / 1000)
        return waiting_bytes, age_s

    def _segments(self) -> list[tuple[Path, int]]:
        """List the segments and their sizes, in order."""
        segments = []
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".spool"):
                    with suppress(FileNotFoundError):
                        segments.append((self.folder / entry.name, entry.stat().st_size))
        return sorted(segments)

    def _write(self, data: bytes) -> int:
        """Append under the lock, and return the segment's file descriptor. A failed write is undone."""
        segments = self._segments()
        if sum(size for _, size in segments) + len(data) > self.max_bytes:
            raise SpoolFull(f"Redis is away, and the spool {self.folder} is full: it may hold {self.max_bytes:,} bytes")
        path, size = segments[-1] if segments else (self.folder, self.segment_bytes)
        if size >= self.segment_bytes:
            # Never reuse a number: the position in forward.lock must fit one file only.
            last = int(path.stem) if segments else 0
            path = self.folder / f"{max(time.time_ns(), last + 1):020d}.spool"
        segment = permissions.create_file(path, os.O_RDWR | os.O_APPEND)
        size = os.fstat(segment).st_size
        try:
            if size and os.pread(segment, 1, size - 1) != b"\n":  # a process died during its write
                data = b"\n" + data
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[os.write(segment, remaining) :]
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
        """Send a segment, then remove it, or rename it to `.bad` if it has damaged lines."""
        sent = 0
        with path.open("rb") as file:
            offset, damaged = self._progress(path.name, os.fstat(file.fileno()).st_size)
            damaged_before = damaged
            while True:
                with self._locked_for_append():  # no write is under way: a last line without a line break is whole or torn
                    size = os.fstat(file.fileno()).st_size
                    if offset == size:
                        os.ftruncate(progress, 0)
                        if damaged:
                            path.rename(path.with_suffix(".bad"))
                        else:
                            path.unlink()
                        return Forwarded(sent, damaged - damaged_before)
                # After a power loss, the noted offset must not lie beyond the end of the segment.
                os.fdatasync(file.fileno())
                file.seek(offset)
                while offset < size:
                    start, arguments = offset, list[str | bytes]()
                    while offset < size and offset - start < _BATCH_BYTES and len(arguments) < 2 * _BATCH_RECORDS:
                        line = file.readline(size - offset)
                        record = SpoolRecord.parse(line)
                        if record:
                            arguments += [record.redis_id, record.body]
                        elif line != b"\n":
                            damaged += 1
                            _logger.warning("%s: %d bytes at offset %d are damaged", path, len(line), offset)
                        offset += len(line)
                    if arguments:
                        send(arguments)
                        sent += len(arguments) // 2
                    with suppress(OSError):  # continue on a full disk: forwarding frees it
                        os.pwrite(progress, b"%b %020d %020d\n" % (path.name.encode(), offset, damaged), 0)

    def _progress(self, name: str, size: int) -> tuple[int, int]:
        """Return how far a segment is forwarded, and its damaged lines so far."""
        with suppress(FileNotFoundError):
            match = _PROGRESS.fullmatch((self.folder / "forward.lock").read_bytes())
            if match and match[1] == name.encode() and int(match[2]) <= size:
                return int(match[2]), int(match[3])
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
                wait_s = min(2 * wait_s, _MAX_RETRY_S)
                continue
            if sent:
                _logger.info("%d events were sent on from %s", sent, self.folder)
            wait_s, failing = 0.05, False
            with self._lock:  # an append from here on starts a new thread
                if not self.holds():
                    self._forwarder = None
                    return

    @contextmanager
    def _locked_for_append(self) -> Iterator[None]:
        """Raises SendRefused if this thread holds the lock already: flock(2) would wait for ever."""
        with once_at_a_time("write to the spool"), self._locked("append.lock"):
            yield

    @contextmanager
    def _locked(self, name: str, *, poll_s: float = 0) -> Iterator[int]:
        """Lock a file and yield its descriptor. Each call opens it again: flock(2) locks open files, not threads.

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


_open_locks: set[int] = set()


def _close_locks() -> None:
    """Close a forked child's copies of locks: they would keep other processes out after the parent unlocks."""
    while _open_locks:
        os.close(_open_locks.pop())


os.register_at_fork(after_in_child=_close_locks)
