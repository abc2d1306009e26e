"""The signals of a real Celery worker become events."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration import recorded
from tests.integration.recorded import sent, types

celery = pytest.importorskip("celery", reason="install requirements-integrations.in: needs celery")

APP = """
import os, time
from celery import Celery
from celery.exceptions import Ignore
from tasks.celery_signals import record_evaluations
from tasks.recording import current_recording

app = Celery("app", broker=os.environ["BROKER"])
app.conf.broker_connection_retry_on_startup = True
for _ in range(2):  # a module that is imported under two names
    record_evaluations(app, executor_id="w")

@app.task(evaluation={"language": "py", "code": "c"})
def grade(score):
    run = current_recording()
    run.score, run.output = score, "graded"

@app.task(bind=True, evaluation=True, max_retries=5)
def flaky(self):
    if self.request.retries < 2:
        raise self.retry(exc=ValueError("bad"), countdown=0)

@app.task(evaluation=True)
def fails():
    raise ValueError("bad")

@app.task(evaluation=True)
def sleeps():
    time.sleep(60)

@app.task(evaluation=True)
def ignored():
    raise Ignore()

@app.task(evaluation=True)
def dies():
    os._exit(9)

@app.task
def plain():
    pass
"""

Eventually = Callable[..., None]


@pytest.fixture
def app(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An application whose worker runs, on the same server as evalstore's queue."""
    (tmp_path / "celery_app.py").write_text(APP)
    paths = f"{tmp_path}:{recorded.ROOT}"
    environment = {**os.environ, "BROKER": redis_url, "EVALSTORE_REDIS_URL": redis_url, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "-c", "2", "-l", "INFO", "-P", "prefork"]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    made = celery.Celery("app", broker=redis_url)
    yield made
    worker.terminate()
    try:
        worker.wait(15)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    made.close()
    print((tmp_path / "log").read_text()[-6000:])


def ended(redis_url: str, eval_id: str, count: int) -> Callable[[], bool]:
    return lambda: len(sent(redis_url, eval_id)) >= count


def test_tasks_are_recorded_with_their_options_attempts_and_endings(app: Any, redis_url: str, eventually: Eventually) -> None:
    header = {"evaluation": {"eval_id": "run-1:7", "run_id": "run-1"}}
    app.send_task("celery_app.grade", (0.5,), headers=header)
    app.send_task("celery_app.plain", task_id="plain")
    for name in ("flaky", "fails", "ignored", "dies"):
        app.send_task(f"celery_app.{name}", task_id=name)
    app.send_task("celery_app.sleeps", task_id="soft", soft_time_limit=1, time_limit=30)
    app.send_task("celery_app.sleeps", task_id="hard", time_limit=1)
    app.send_task("celery_app.grade", (1,), task_id="expired", expires=datetime.now(UTC) - timedelta(seconds=10))
    for eval_id, count in {"run-1:7": 3, "flaky": 6, "fails": 2, "ignored": 2, "soft": 2, "hard": 2, "dies": 2}.items():
        eventually(ended(redis_url, eval_id, count), within_s=40, what=eval_id)
    queued, started, completed = sent(redis_url, "run-1:7")
    assert types([queued, started, completed]) == ["queued", "started", "completed"]
    assert (queued["code"], queued["language"], queued["run_id"]) == ("c", "py", "run-1")
    assert (completed["score"], completed["output"], completed["executor_id"]) == (0.5, "graded", "w")
    assert types(sent(redis_url, "flaky")) == ["started", "failed", "started 2", "failed 2", "started 3", "completed 3"]
    assert "ValueError: bad" in sent(redis_url, "flaky")[1]["error"]
    assert types(sent(redis_url, "fails")) == ["started", "failed"]
    assert "in fails" in sent(redis_url, "fails")[1]["error"]
    assert types(sent(redis_url, "ignored")) == ["started", "cancelled"]
    assert types(sent(redis_url, "soft")) == ["started", "timed_out"]
    assert sent(redis_url, "soft")[0]["timeout_s"] == 1
    assert types(sent(redis_url, "hard")) == ["started", "timed_out"]
    assert types(sent(redis_url, "dies")) == ["started", "failed"]
    assert "WorkerLostError" in sent(redis_url, "dies")[1]["error"]
    assert types(sent(redis_url, "expired")) == ["cancelled"]
    assert sent(redis_url, "plain") == []


def test_a_revoked_task_is_cancelled_before_or_while_it_runs(app: Any, redis_url: str, eventually: Eventually) -> None:
    app.send_task("celery_app.sleeps", task_id="running")
    eventually(ended(redis_url, "running", 1), within_s=40, what="a start")
    app.control.revoke("waiting")
    eventually(lambda: "waiting" in str(app.control.inspect().revoked()), within_s=20, what="the revocation")
    app.send_task("celery_app.sleeps", task_id="waiting")
    app.control.revoke("running", terminate=True)
    for eval_id, count in {"running": 2, "waiting": 1}.items():
        eventually(ended(redis_url, eval_id, count), within_s=20, what=eval_id)
    assert types(sent(redis_url, "running")) == ["started", "cancelled"]
    assert types(sent(redis_url, "waiting")) == ["cancelled"]
    assert [sent(redis_url, name)[-1]["reason"] for name in ("running", "waiting")] == ["terminated", "revoked"]
