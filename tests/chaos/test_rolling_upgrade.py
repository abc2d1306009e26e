"""A rolling upgrade under load: workers of an earlier release and of this one store events of the same evaluations together."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from evalstore.storage import migrations
from tests.chaos.conftest import Worlds
from tests.chaos.relay import ROOT
from tests.chaos.world import evaluations, wait_until
from tests.integration.shell import Operator

# The last commit before records had a merge state; its tables have the revision 0008.
EARLIER = "2c00ccd"


@pytest.fixture
def earlier_release(tmp_path: Path) -> Path:
    """A folder with the code of the earlier release."""
    done = subprocess.run(["git", "archive", EARLIER], cwd=ROOT, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the history of the repository is not here: git archive {EARLIER} failed")
    folder = tmp_path / "earlier"
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_workers_of_the_earlier_release_and_new_ones_store_together_and_all_records_are_right(
    worlds: Worlds, empty_database_url: str, redis_url: str, earlier_release: Path, tmp_path: Path
) -> None:
    command = ["-c", "import sys; from storage import migrations; migrations.upgrade(sys.argv[1])", empty_database_url]
    subprocess.run([sys.executable, *command], cwd=earlier_release, check=True, capture_output=True)
    world = worlds(empty_database_url, redis_url)
    old = [world.workers(EVALSTORE_BATCH_EVENTS="40") for _ in range(2)]
    for workers in old:
        workers.cwd = earlier_release
        workers.start()
    with world.sending():
        world.send(evaluations(100, "before"))
        migrations.upgrade(empty_database_url)
        new = world.workers(EVALSTORE_BATCH_EVENTS="40")
        new.start()
        _store_together(world.applied, 1500)
        old[0].stop()
        _store_together(world.applied, 500)
        # A rollback in between: a worker of the earlier release comes back, and goes in the middle of its work.
        old[0].start()
        _store_together(world.applied, 1500)
        old[0].kill()
        old[1].stop()
        _store_together(world.applied, 500)
    world.audit()
    operator = Operator(empty_database_url, redis_url, tmp_path)
    replayed = operator.evalstore("replay", "--all", "-o", "json")
    assert (replayed.status, replayed.json["different"]) == (0, 0)
    absent = "SELECT count(*) FILTER (WHERE merge_version IS DISTINCT FROM version) AS old, count(*) AS n FROM evaluations"
    [row] = operator.rows(absent)
    assert 0 < row["old"] < row["n"], "both releases stored records"


def _store_together(applied: Callable[[], int], events: int) -> None:
    until = applied() + events
    wait_until(lambda: applied() >= until, within_s=120, what=f"{events} more events are stored")
