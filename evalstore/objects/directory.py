"""The object store in a directory: `file:///folder`, which every process that uses it sees, such as a disk or an NFS mount.

    folder/ab/cd/abcd….zst    the objects, below the first digits of their names
    folder/tmp/               what is being written, and what a crash left of it

A file gets its name only once all of it is on disk, so that whatever has a name is whole. Files and folders take the group of
their folder; their modes follow the umask and give other users nothing (permissions.py).
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

_ASIDE_DIGITS = 16  # what follows the name of an object that is put aside: unlike that of any other

Look = Callable[[Reference], State]


class DirectoryStore:
    """Objects in a folder. It is created by the first write, if its parent exists: an absent mount is an outage, not empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._temporary = folder / "tmp"

    def open(self, key: str, start: int, stop: int | None = None) -> Stream:
        """Bytes `start` to `stop` as stored, or for a negative start that many at the end, or all there are."""
        with self._errors("read", key):
            file = self._found(key)
            stat = os.fstat(file.fileno())
            begin = max(0, stat.st_size + start) if start < 0 else start
            file.seek(begin)
        listed = Listed(key, stat.st_size, _time(stat))
        length = (stat.st_size if stop is None else stop) - begin
        return Stream(file, listed=listed, length=length, errors=self._errors)

    def write(self, encoder: Encoder, look: Look) -> bool:
        """Store what `encoder` yields, unless `look` says, once its name is known, that it is there; whether it was stored."""
        with self._errors("write to", str(self.folder)):
            self._make(self._temporary)
        if encoder.reference is not None and look(encoder.reference) == "intact":
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
                if reference is None or look(reference) == "intact":
                    return False
                with self._errors("write to", name):
                    os.fsync(file.fileno())
            path = self._path(reference.key)
            with self._errors("write", reference.key):
                self._make(path.parent)
                temporary.replace(path)  # in place of a damaged one, or of the same that another wrote meanwhile
                _sync(path.parent)
            return True
        finally:
            with self._errors("write to", name):
                temporary.unlink(missing_ok=True)

    def _found(self, key: str) -> BinaryIO:
        """The file, also while a `delete` that will not be has put it aside."""
        path = self._path(key)
        with suppress(FileNotFoundError):
            return path.open("rb", buffering=0)
        for aside in self._temporary.glob(f"{key}.{'?' * _ASIDE_DIGITS}"):
            with suppress(FileNotFoundError):
                return aside.open("rb", buffering=0)
        return path.open("rb", buffering=0)  # it was put back, or written anew, meanwhile

    def delete(self, key: str, unmodified_since: datetime | None = None) -> bool:
        """Delete it, unless it was modified since that time; whether it was deleted. Of two at once, one gets True.

        An old one is first put aside and then looked at again: a `touch` comes either before that, and is seen, or after, and
        finds nothing.
        """
        path = self._path(key)
        aside = self._temporary / f"{key}.{os.urandom(_ASIDE_DIGITS // 2).hex()}"

        def is_young(stat: os.stat_result) -> bool:
            return unmodified_since is not None and _time(stat) > unmodified_since

        try:
            with self._errors("delete", key):
                if is_young(path.stat()):
                    return False
                self._make(self._temporary)
                path.rename(aside)
                if is_young(aside.stat()):
                    self._put_back(aside)
                    return False
                aside.unlink()
                return True
        except ObjectMissing:  # or another has put it back
            return False

    def _put_back(self, aside: Path) -> None:
        """Undo the first half of a `delete`; one written in its place meanwhile stays. It has a name at every moment."""
        path = self._path(aside.stem)
        try:
            os.link(aside, path)  # unlike a rename, not in place of one that is younger
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            aside.rename(path)
        aside.unlink(missing_ok=True)

    def touch(self, key: str) -> None:
        """Make it as young as one just written."""
        with self._errors("touch", key):
            os.utime(self._path(key))

    def objects(self, after: str = "") -> Iterator[Listed]:
        """The objects whose names come after that one, in the order of their names; other files are passed over."""
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
                with suppress(FileNotFoundError):  # deleted meanwhile
                    stat = path.stat()
                    yield Listed(path.name, stat.st_size, _time(stat))

    def orphans(self, before: datetime, *, remove: bool = False) -> list[str]:
        """What crashes left behind and is older than `before`; removed, or finished, if asked to."""
        found = []
        with self._errors("list", str(self._temporary)), suppress(FileNotFoundError):
            for path in sorted(self._temporary.iterdir()):
                with suppress(FileNotFoundError):
                    # Since when it is there: what is put aside is as old as it was.
                    if datetime.fromtimestamp(path.stat().st_ctime, UTC) < before:
                        found.append(path.name)
                        if remove and is_key(path.stem):
                            self._put_back(path)  # nobody knows any more whether it was to be deleted: the next sweep does
                        elif remove:
                            path.unlink()
        return found

    def close(self) -> None:
        """Nothing stays open."""

    def _path(self, key: str) -> Path:
        if not is_key(key):
            raise ValueError(f"not the name of an object: {key!r}")
        return self.folder / key[:2] / key[2:4] / key

    def _make(self, folder: Path) -> None:
        """Create a folder of the store where it is missing, and see to it that it outlasts a power loss."""
        if not folder.is_dir():
            if folder != self.folder:
                self._make(folder.parent)
            permissions.make_folder(folder)
            _sync(folder.parent)

    @contextmanager
    def _errors(self, verb: str, what: str) -> Iterator[None]:
        """What the operating system says, as what the caller can do about it."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and is_key(what) and self.folder.is_dir():
                raise ObjectMissing(f"object {what} is not in {self.folder}") from None
            said = f"cannot {verb} {what} in {self.folder}: {error.strerror or error}"
            if isinstance(error, PermissionError):
                said += f": {permissions.explain(self._path(what) if is_key(what) else Path(error.filename or self.folder))}"
            if is_key(what) and self._is_about_one(error, self._path(what)):
                raise ObjectUnavailable(said, needs_operator=True) from error
            raise ObjectStoreOutage(said) from error

    def _is_about_one(self, error: OSError, path: Path) -> bool:
        """Whether the store can be used, and only what lies below one of its subfolders cannot."""
        if isinstance(error, PermissionError):
            return permissions.blocking_path(path).is_relative_to(self.folder.absolute()) and os.access(
                self.folder, os.R_OK | os.X_OK, effective_ids=True
            )
        return isinstance(error, IsADirectoryError | NotADirectoryError) and self.folder.is_dir()


def _time(stat: os.stat_result) -> datetime:
    return datetime.fromtimestamp(stat.st_mtime, UTC)


def _write_all(file: int, block: bytes | memoryview) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
