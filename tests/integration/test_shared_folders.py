"""Folders that processes of several users share: the object store in a directory, the spool, the runtime directory."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from evalstore.objects import object_store
from evalstore.objects.existence_cache import ExistenceCache
from evalstore.objects.object_store import Stores
from models.errors import ObjectUnavailable
from models.settings import Settings

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")

ROOT = Path(__file__).parents[2]
GROUP, FIRST, SECOND = 54000, 54001, 54002
# Import everything first: the interpreter's folder may be closed to other users.
BECOME = """
import os, traceback, models.settings, tasks.spool, evalstore.telemetry.process_registry, evalstore.objects.object_store
models.settings.Settings()
os.umask({umask})
os.setgroups([{group}])
os.setgid({user})
os.setuid({user})
"""
STORE = """
import sys
from datetime import UTC, datetime, timedelta
from models.content import Reference
from models.settings import Settings
from evalstore.objects import object_store
url, act, *given = sys.argv[1:]
store = object_store.open_store(url, Settings())
later = datetime.now(UTC) + timedelta(hours=1)
if act == "put":
    print(*object_store.put(store, b"x" * 70_000, touch_before=later).reference)
elif act == "read":
    assert b"".join(object_store.read(store, Reference(given[0], int(given[1]), given[2]))) == b"x" * 70_000
    print(len(list(store.objects())))
elif act == "delete":
    key = given[0] + (".zst" if given[2] == "zstd" else "")
    print(store.delete(key, unmodified_since=later), store.orphans(later, remove=True))
"""
SPOOL = """
import sys
from pathlib import Path
from tasks.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=10**6)
if sys.argv[2] == "append":
    spool.append([sys.argv[3], "{}"])
else:
    print(spool.forward(lambda arguments: print(arguments[::2])).sent)
"""
RUNTIME = """
from evalstore.telemetry.process_registry import runtime
from models.settings import settings
print(runtime(settings().runtime_dir))
"""


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the group, with the bits that a test asks for: setgid unless it says otherwise."""
    with TemporaryDirectory(dir="/var/tmp") as made:
        top, folder = Path(made), Path(made) / "shared"
        top.chmod(0o755)
        folder.mkdir()
        os.chown(folder, 0, GROUP)
        folder.chmod(getattr(request, "param", 0o2770))
        yield folder


def run(code: str, *arguments: object, user: int, umask: int = 0o002, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a user of the group, whose own first group is another."""
    become = BECOME.format(umask=umask, group=GROUP, user=user)
    command = [sys.executable, "-c", become + code, *map(str, arguments)]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def fine(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("shared", [0o2770, 0o770, 0o2775], indirect=True, ids=oct)
def test_users_of_a_group_share_an_object_store(shared: Path) -> None:
    url = f"file://{shared}/objects"
    reference = fine(run(STORE, url, "put", user=FIRST)).split()
    assert fine(run(STORE, url, "read", *reference, user=SECOND)) == "1"
    assert fine(run(STORE, url, "put", user=SECOND)).split() == reference  # This touches the object too.
    assert fine(run(STORE, url, "delete", *reference, user=SECOND)) == "True []"
    assert fine(run(STORE, url, "put", user=SECOND)).split() == reference
    assert fine(run(STORE, url, "read", *reference, user=FIRST)) == "1"
    assert {path.stat().st_gid for path in shared.rglob("*")} == {GROUP}


def test_a_file_that_refuses_another_user_is_an_error_that_names_path_owner_and_user(shared: Path) -> None:
    url = f"file://{shared}/objects"
    reference = fine(run(STORE, url, "put", user=FIRST)).split()
    (found,) = [path for path in shared.rglob("*") if path.is_file()]
    found.chmod(0o600)
    said = run(STORE, url, "read", *reference, user=SECOND).stderr
    assert "ObjectUnavailable" in said
    assert f"{found} belongs to user {FIRST} and group {GROUP}, mode 0600; this process runs as user {SECOND}" in said
    found.parent.chmod(0o700)
    assert f"{found.parent} belongs to user {FIRST}" in run(STORE, url, "read", *reference, user=SECOND).stderr


def test_a_store_that_refuses_another_user_is_an_error_that_names_path_owner_and_user(shared: Path) -> None:
    url = f"file://{shared}/objects"
    fine(run(STORE, url, "put", user=FIRST, umask=0o077))
    said = run(STORE, url, "put", user=SECOND).stderr
    assert "ObjectStoreOutage" in said
    assert f"{shared}/objects belongs to user {FIRST} and group {GROUP}, mode 2700; this process runs as user {SECOND}" in said


def test_one_unreadable_object_is_refused_alone(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/objects"
    store = object_store.open_store(url, Settings())
    bad, good = object_store.put(store, b"bad").reference, object_store.put(store, b"good").reference
    path = tmp_path / "objects" / bad.key[:2] / bad.key[2:4] / bad.key
    path.unlink()
    path.mkdir()  # Even root cannot read a folder as a file.
    presence = ExistenceCache(Stores(Settings(object_store_url=url)))
    absent = presence.missing([bad, good])
    assert set(absent) == {bad}
    assert isinstance(absent[bad], ObjectUnavailable)
    assert presence.outage is None


@pytest.mark.parametrize("forwarder", [FIRST, SECOND])
def test_users_of_a_group_share_a_spool(shared: Path, forwarder: int) -> None:
    folder = shared / "spool"
    for number, user in enumerate((FIRST, SECOND, FIRST)):
        fine(run(SPOOL, folder, "append", number, user=user))
    assert fine(run(SPOOL, folder, "forward", user=forwarder)).splitlines() == ["[b'0', b'1', b'2']", "3"]
    fine(run(SPOOL, folder, "append", 3, user=SECOND))
    assert fine(run(SPOOL, folder, "forward", user=FIRST)).splitlines()[-1] == "1"


def test_a_spool_that_refuses_another_user_is_an_error_that_names_path_owner_and_user(shared: Path) -> None:
    folder = shared / "spool"
    fine(run(SPOOL, folder, "append", 1, user=FIRST, umask=0o077))
    said = run(SPOOL, folder, "append", 2, user=SECOND).stderr
    assert "SpoolFull" in said
    assert f"{folder} belongs to user {FIRST} and group {GROUP}, mode 2700; this process runs as user {SECOND}" in said


def test_a_runtime_directory_of_another_user_is_an_error_that_names_path_owner_and_user(shared: Path) -> None:
    folder = shared / "running"
    fine(run(RUNTIME, user=FIRST, EVALSTORE_RUNTIME_DIR=str(folder)))
    said = run(RUNTIME, user=SECOND, EVALSTORE_RUNTIME_DIR=str(folder)).stderr
    assert f"{folder} belongs to user {FIRST}" in said
    assert f"this process runs as user {SECOND}" in said
    assert "EVALSTORE_RUNTIME_DIR of its own" in said
