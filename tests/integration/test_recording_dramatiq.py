"""The middleware records the actors of an application's own broker, in a real Dramatiq worker."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AgeLimit, AsyncIO, Middleware, Retries, SkipMessage, TimeLimit
from dramatiq.middleware.shutdown import Shutdown

from models.settings import settings
from tasks.broker import broker as sender
from tasks.middleware import RecordEvaluations
from tasks.recording import current_recording
from tests.integration.recorded import sent, types

Json = dict[str, Any]


class Skip(Middleware):
    """Skips messages that ask for it."""

    def before_process_message(self, _broker: dramatiq.Broker, message: dramatiq.broker.MessageProxy) -> None:
        if "skip" in message.args:
            raise SkipMessage


@pytest.fixture
def broker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisBroker]:
    """The broker of an application, on the same server under names of its own."""
    monkeypatch.setenv("EVALSTORE_REDIS_URL", redis_url)
    settings.cache_clear()
    sender.cache_clear()
    made = RedisBroker(
        url=redis_url,
        namespace="app",
        middleware=[
            AgeLimit(),
            TimeLimit(interval=20),
            Skip(),
            RecordEvaluations(executor_id="w"),
            AsyncIO(),
            Retries(max_retries=0),
        ],
    )
    yield made
    made.close()
    made.client.close()
    sender().client.close()
    settings.cache_clear()
    sender.cache_clear()


def work(broker: RedisBroker) -> None:
    """Process all messages, with their retries."""
    worker = dramatiq.Worker(broker, worker_timeout=20, worker_threads=2)
    broker.emit_after("process_boot")
    worker.start()
    broker.join("default", timeout=20_000)
    worker.join()
    worker.stop()


def actor(broker: RedisBroker, function: Callable[..., Any], **options: Any) -> dramatiq.Actor[..., Any]:
    made: dramatiq.Actor[..., Any] = dramatiq.actor(broker=broker, actor_name="grade", **options)(function)
    return made


def test_an_actor_is_recorded_with_the_options_of_actor_and_message(broker: RedisBroker, redis_url: str) -> None:
    def grade(score: float) -> None:
        run = current_recording()
        assert run is not None
        run.score, run.output = score, "graded"

    grader = actor(broker, grade, evaluation={"language": "py", "code": "default"}, time_limit=60_000)
    message = grader.send_with_options(args=(0.5,), eval_id="run-1:7", evaluation={"run_id": "run-1", "code": "c"})
    unnamed = grader.send(1.0)
    work(broker)
    queued, started, completed = sent(redis_url, "run-1:7")
    assert types([queued, started, completed]) == ["queued", "started", "completed"]
    assert (queued["code"], queued["language"], queued["run_id"]) == ("c", "py", "run-1")
    assert queued["occurred_at"] < started["occurred_at"]
    assert (started["executor_id"], started["timeout_s"]) == ("w", 60)
    assert (completed["score"], completed["output"], completed["exit_code"]) == (0.5, "graded", 0)
    assert message.message_id != "run-1:7"
    assert types(sent(redis_url, unnamed.message_id)) == ["queued", "started", "completed"]


def test_actors_without_the_option_are_not_recorded(broker: RedisBroker, redis_url: str) -> None:
    grader = actor(broker, lambda: None)
    grader.send()
    grader.send_with_options(eval_id="asked")
    grader.send_with_options(evaluation=False, eval_id="refused")
    work(broker)
    assert [event["eval_id"] for event in sent(redis_url)] == ["asked", "asked"]


def test_each_retry_is_the_next_attempt_and_a_failure_has_its_traceback(broker: RedisBroker, redis_url: str) -> None:
    attempts: list[int] = []

    def grade() -> None:
        run = current_recording()
        assert run is not None
        attempts.append(run.attempt)
        if len(attempts) < 3:
            raise ValueError("bad")

    actor(broker, grade, evaluation=True, max_retries=2, min_backoff=1, max_backoff=2).send_with_options(eval_id="e")
    work(broker)
    assert attempts == [1, 2, 3]
    events = sent(redis_url)
    assert types(events) == ["started", "failed", "started 2", "failed 2", "started 3", "completed 3"]
    assert "ValueError: bad" in events[1]["error"]
    assert "in grade" in events[1]["error"]


def test_the_time_limit_of_the_actor_is_timed_out(broker: RedisBroker, redis_url: str) -> None:
    def grade() -> None:
        while True:
            time.sleep(0.01)

    actor(broker, grade, time_limit=200).send_with_options(eval_id="e")
    work(broker)
    started, ending = sent(redis_url)
    assert types([started, ending]) == ["started", "timed_out"]
    assert started["timeout_s"] == 0.2


def test_an_abort_or_shutdown_is_cancelled(broker: RedisBroker, redis_url: str) -> None:
    def grade() -> None:
        raise Shutdown

    actor(broker, grade).send_with_options(eval_id="e")
    work(broker)
    assert types(sent(redis_url)) == ["started", "cancelled"]
    assert sent(redis_url)[-1]["reason"] == "Shutdown"


def test_skipped_and_expired_messages_are_cancelled_without_a_start(broker: RedisBroker, redis_url: str) -> None:
    grader = actor(broker, lambda *_: None)
    grader.send_with_options(args=("skip",), eval_id="skipped")
    grader.send_with_options(eval_id="expired", max_age=1)
    time.sleep(0.01)
    work(broker)
    assert types(sent(redis_url, "skipped")) == ["cancelled"]
    assert types(sent(redis_url, "expired")) == ["cancelled"]


def test_an_async_actor_finds_its_run(broker: RedisBroker, redis_url: str) -> None:
    async def grade() -> None:
        run = current_recording()
        assert run is not None
        run.output = "from the event loop"

    actor(broker, grade).send_with_options(eval_id="e")
    work(broker)
    assert types(sent(redis_url)) == ["started", "completed"]
    assert sent(redis_url)[-1]["output"] == "from the event loop"


def test_actors_run_while_the_events_cannot_be_sent(broker: RedisBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALSTORE_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("EVALSTORE_SEND_TIMEOUT_S", "0.1")
    settings.cache_clear()
    sender.cache_clear()
    ran: list[str] = []
    actor(broker, ran.append).send_with_options(args=("ran",), eval_id="e")
    work(broker)
    assert ran == ["ran"]
