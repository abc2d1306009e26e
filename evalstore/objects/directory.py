"""An object store in a directory, `file:///folder`. All processes must see the folder, for example on a disk or NFS mount.

    folder/ab/cd/abcd….zst    objects, below the first digits of their names
    folder/tmp/               files that are being written or deleted, also after a crash

A file is renamed to its object's name once it is on disk, so a named object is always whole. Files and folders take the group
of their folder. Their modes follow the umask, and give other users nothing (permissions.py).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from evalstore.objects import permissions
from evalstore.objects.frames import Encoder, Listed, State, Stream, is_key
from models.content import Reference
from models.errors import ObjectMissing, ObjectStoreOutage, ObjectUnavailable

_TRASH_DIGITS = 16  # length of the random suffix of an object in tmp/ that is being deleted

Probe = Callable[[Reference], State]


class DirectoryStore:
    """Objects in a folder.

    The first write creates the folder. If its parent is missing too, a mount may be absent: an outage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder / "tmp"

    def open(self, key: str, start: int, stop: int | None = None) -> Stream:
        """Open stored bytes `start` to `stop`. A negative `start` counts from the end, at most to the beginning."""
        with self._errors("read", key):
            file = self._open_file(key)
            stat = os.fstat(file.fileno())
            begin = max(0, stat.st_size + start) if start < 0 else start
            file.seek(begin)
        listed = Listed(key, stat.st_size, _modified_at(stat))
        length = (stat.st_size if stop is None else stop) - begin
        return Stream(file, listed=listed, length=length, errors=self._errors)

    def write(self, encoder: Encoder, probe: Probe) -> bool:
        """Store the blocks of `encoder`, unless `probe` finds the object intact. Returns whether it was stored."""
        with self._errors("write to", str(self.folder)):
            self._create_folder(self._temporary)
        if encoder.reference is not None and probe(encoder.reference) == "intact":
            return False
        with self._errors("write to", str(self.folder)):
            temporary = self._temporary / f"tmp{os.urandom(8).hex()}"
            handle, name = permissions.create_file(temporary, os.O_WRONLY | os.O_EXCL), str(temporary)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                for block in encoder:
                    with self._errors("write to", name):
                        _write_all(file.fileno(), block)
                reference = encoder.reference
                if reference is None or probe(reference) == "intact":
                    return False
                with self._errors("write to", name):
                    os.fsync(file.fileno())
            path = self._path(reference.key)
            with self._errors("write", reference.key):
                self._create_folder(path.parent)
                temporary.replace(path)  # This replaces a damaged object, or an equal object that another process wrote.
                _sync(path.parent)
            return True
        finally:
            with self._errors("write to", name):
                temporary.unlink(missing_ok=True)

    def _open_file(self, key: str) -> BinaryIO:
        """Open the file, even while `delete` has moved it and may move it back."""
        path = self._path(key)
        with suppress(FileNotFoundError):
            return path.open("rb", buffering=0)
        for trash in self._temporary.glob(f"{key}.{'?' * _TRASH_DIGITS}"):
            with suppress(FileNotFoundError):
                return trash.open("rb", buffering=0)
        return path.open("rb", buffering=0)  # The file was moved back or written again.

    def delete(self, key: str, unmodified_since: datetime | None = None) -> bool:
        """Delete the object, unless it was modified after `unmodified_since`. Returns whether this call deleted it.

        An old object is moved to tmp/, and its time is checked again. A `touch` before the move is seen by that check; a later
        `touch` raises ObjectMissing.
        """
        path = self._path(key)
        trash = self._temporary / f"{key}.{os.urandom(_TRASH_DIGITS // 2).hex()}"

        def is_new(stat: os.stat_result) -> bool:
            return unmodified_since is not None and _modified_at(stat) > unmodified_since

        try:
            with self._errors("delete", key):
                if is_new(path.stat()):
                    return False
                self._create_folder(self._temporary)
                path.rename(trash)
                if is_new(trash.stat()):
                    self._restore(trash)
                    return False
                trash.unlink()
                return True
        except ObjectMissing:  # Another process may have moved the file back.
            return False

    def _restore(self, trash: Path) -> None:
        """Undo the move of a `delete`, unless the object was written again. The file keeps a name all the time."""
        path = self._path(trash.stem)
        try:
            os.link(trash, path)  # unlike a rename, it does not replace a newer object
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            trash.rename(path)
        trash.unlink(missing_ok=True)

    def touch(self, key: str) -> None:
        """Set the object's time to now, as if it were just written."""
        with self._errors("touch", key):
            os.utime(self._path(key))

    def objects(self, after: str = "") -> Iterator[Listed]:
        """List the objects with names after `after`, in order. Skips other files."""
        with self._errors("list", str(self.folder)):
            if not self.folder.exists() and self.folder.parent.exists():
                return  # nothing was ever stored
            for first in self._fan_out(self.folder):
                if first.name >= after[:2]:
                    for second in self._fan_out(first):
                        yield from self._in_folder(second, after)

    def _fan_out(self, folder: Path) -> list[Path]:
        return [path for path in sorted(folder.iterdir()) if len(path.name) == 2 and path.is_dir()]

    def _in_folder(self, folder: Path, after: str) -> Iterator[Listed]:
        for path in sorted(folder.iterdir()):
            if path.name > after and is_key(path.name) and path == self._path(path.name):
                with suppress(FileNotFoundError):  # Another process deleted the object.
                    stat = path.stat()
                    yield Listed(path.name, stat.st_size, _modified_at(stat))

    def write_note(self, folder: str, name: str, text: bytes) -> None:
        """Write a small file that is no object, such as a tombstone; one of that name stays as it is."""
        path = self.folder / folder / name
        with self._errors("write to", str(path.parent)):
            self._create_folder(self._temporary)
            self._create_folder(path.parent)
            if path.exists():
                return
            temporary = self._temporary / f"tmp{os.urandom(8).hex()}"
            handle = permissions.create_file(temporary, os.O_WRONLY | os.O_EXCL)
            with os.fdopen(handle, "wb", buffering=0) as file:
                _write_all(file.fileno(), text)
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)

    def read_note(self, folder: str, name: str) -> bytes | None:
        """Read a note, None where there is none."""
        with self._errors("read", str(self.folder)), suppress(FileNotFoundError):
            return (self.folder / folder / name).read_bytes()
        return None

    def notes(self, folder: str) -> list[str]:
        """Return the names of all notes in a folder."""
        with self._errors("list", str(self.folder)), suppress(FileNotFoundError):
            return sorted(path.name for path in (self.folder / folder).iterdir())
        return []

    def orphans(self, before: datetime, *, remove: bool = False) -> list[str]:
        """List files in tmp/ older than `before`, which crashes left behind.

        With `remove`, remove them or move objects back.
        """
        names = []
        with self._errors("list", str(self._temporary)), suppress(FileNotFoundError):
            for path in sorted(self._temporary.iterdir()):
                with suppress(FileNotFoundError):
                    # ctime is the time of the move to tmp/. A moved object keeps its mtime.
                    if datetime.fromtimestamp(path.stat().st_ctime, UTC) < before:
                        names.append(path.name)
                        if remove and is_key(path.stem):
                            self._restore(path)  # the delete is unfinished; the next sweep decides again
                        elif remove:
                            path.unlink()
        return names

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _path(self, key: str) -> Path:
        if not is_key(key):
            raise ValueError(f"not the name of an object: {key!r}")
        return self.folder / key[:2] / key[2:4] / key

    def _create_folder(self, folder: Path) -> None:
        """Create a missing folder of the store, and sync it to disk."""
        if not folder.is_dir():
            if folder != self.folder:
                self._create_folder(folder.parent)
            permissions.make_folder(folder)
            _sync(folder.parent)

    @contextmanager
    def _errors(self, verb: str, what: str) -> Iterator[None]:
        """Translate OSError into ObjectMissing, ObjectUnavailable or ObjectStoreOutage."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and is_key(what) and self.folder.is_dir():
                raise ObjectMissing(f"object {what} is not in {self.folder}") from None
            message = f"cannot {verb} {what} in {self.folder}: {error.strerror or error}"
            if isinstance(error, PermissionError):
                message += f": {permissions.explain(self._path(what) if is_key(what) else Path(error.filename or self.folder))}"
            if is_key(what) and self._concerns_one_object(error, self._path(what)):
                raise ObjectUnavailable(message, needs_operator=True) from error
            raise ObjectStoreOutage(message) from error

    def _concerns_one_object(self, error: OSError, path: Path) -> bool:
        """Return whether the error concerns one subfolder or object, while the store itself can be used."""
        if isinstance(error, PermissionError):
            return permissions.blocking_path(path).is_relative_to(self.folder.absolute()) and os.access(
                self.folder, os.R_OK | os.X_OK, effective_ids=True
            )
        return isinstance(error, IsADirectoryError | NotADirectoryError) and self.folder.is_dir()


def _modified_at(stat: os.stat_result) -> datetime:
    return datetime.fromtimestamp(stat.st_mtime, UTC)


def _write_all(file: int, block: bytes | memoryview) -> None:
    remaining = memoryview(block)
    while remaining:
        remaining = remaining[os.write(file, remaining) :]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
