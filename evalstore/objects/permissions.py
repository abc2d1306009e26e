"""Modes and groups of files that users of one machine share through a common group.

New files and folders take the group of their folder. Their modes follow the umask, and give other users nothing.
"""

import grp
import os
import pwd
from contextlib import suppress
from pathlib import Path
from typing import Final

FILE_MODE: Final = 0o660
FOLDER_MODE: Final = 0o770


def make_folder(folder: Path, *, parents: bool = False) -> None:
    """Create a missing folder, with `parents` also its parents. Each takes the group of its parent. Raises OSError."""
    try:
        folder.mkdir(mode=FOLDER_MODE)
    except FileNotFoundError:
        if not parents:
            raise
        make_folder(folder.parent, parents=True)
        make_folder(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        _take_group(folder, folder.parent)


def create_file(path: Path, flags: int) -> int:
    """Open or create a file, and return its descriptor. A new file takes the group of its folder. Raises OSError."""
    with suppress(FileNotFoundError):
        if not flags & os.O_EXCL:
            return os.open(path, (flags & ~os.O_CREAT) | os.O_CLOEXEC)
    file = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    _take_group(file, path.parent)
    return file


def _take_group(what: Path | int, folder: Path) -> None:
    group = folder.stat().st_gid
    if os.stat(what).st_gid != group:  # noqa: PTH116  a descriptor has no path
        with suppress(OSError):  # this process is not a member of the group
            os.chown(what, -1, group)


def blocking_path(path: Path) -> Path:
    """Return the first folder above `path` that this process may not enter, or else the last existing part of the path."""
    last = Path("/")
    for part in [*reversed(path.absolute().parents), path.absolute()]:
        try:
            part.stat()
        except OSError:
            break
        last = part
        if part.is_dir() and not os.access(part, os.X_OK, effective_ids=True):
            break
    return last


def explain(path: Path) -> str:
    """Describe the owner and mode of the path that refuses access, and the user of this process."""
    blocking = blocking_path(path)
    try:
        stat = blocking.stat()
    except OSError as error:
        return f"{blocking}: {error.strerror}"
    groups = ", ".join(_group(gid) for gid in sorted({os.getegid(), *os.getgroups()}))
    return (
        f"{blocking} belongs to user {_user(stat.st_uid)} and group {_group(stat.st_gid)}, mode {stat.st_mode & 0o7777:04o}; "
        f"this process runs as user {_user(os.geteuid())}, groups {groups}"
    )


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name} ({gid})"
    except KeyError:
        return str(gid)
