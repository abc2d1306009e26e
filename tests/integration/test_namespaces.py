"""Two complete evalstores on one Redis, kept apart by EVALSTORE_REDIS_NAMESPACE alone."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Retries
from periodiq import Scheduler

from evalstore.local.servers import Postgres
from models.errors import InvalidSettings
from models.settings import Settings
from tasks import store_evaluation
from tasks.broker import SendingBroker
from tasks.confirmations import Confirmations
from tasks.keys import Keys, Names
from tasks.spool import folder_of
from tests.chaos.world import Workers, wait_until
from tests.conftest import new_database
from tests.integration.commands import python
from tests.integration.test_schedule import NOON, jobs
from worker import schedule
from worker.broker import Broker
from worker.verified_database import VerifiedDatabase

ROOT = Path(__file__).parents[2]
E = "/storage/evaluations"


class Evalstore:
    """One of the two: a worker, a service, senders of both kinds and a command line."""

    def __init__(self, namespace: str, database_url: str, redis_url: str, folder: Path) -> None:
        self.namespace, self.database_url, self.redis_url = namespace, database_url, redis_url
        self.environment = {
            "EVALSTORE_DATABASE_URL": database_url,
            "EVALSTORE_REDIS_URL": redis_url,
            "EVALSTORE_REDIS_NAMESPACE": namespace,
            "EVALSTORE_RUNTIME_DIR": str(folder / "run"),
            "EVALSTORE_METRICS_PORT": "0",
        }
        folder.mkdir()
        self.workers = Workers(folder, self.environment, "worker.tasks", 1, 2)
        self.eval_ids = [f"{kind}-{namespace.strip('{}')}" for kind in ("ours", "durable", "stock", "http", "later")]

    def command(self, *words: str) -> Any:
        env = {**os.environ, **self.environment}
        done = subprocess.run(
            [*python(), "-m", "evalstore.cli.app", *words], env=env, cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout else None

    def use(self, api: Any) -> None:
        """Send and store in every way there is."""
        ours, durable, stock, http, later = self.eval_ids
        sender = SendingBroker(url=self.redis_url, namespace=self.namespace, middleware=[])
        sender.enqueue(store_evaluation.message(queued(ours)))
        sender.enqueue_many([store_evaluation.message(queued(durable))], durable=True)
        sender.close()
        others = RedisBroker(url=self.redis_url, namespace=self.namespace)
        others.enqueue(dramatiq.Message("evaluations", "store_evaluation", (queued(stock),), {}, {}))
        others.enqueue(dramatiq.Message("evaluations", "store_evaluation", ({"eval_id": "bad"},), {}, {}))
        others.close()
        assert api.both.post(E, json={"eval_id": http, "code": "c"}).status_code == 201
        asked = api.both.post(E, json={"eval_id": later, "code": "c"}, headers={"Prefer": "respond-async"})
        assert asked.status_code == 202

    def is_done(self) -> bool:
        with psycopg.connect(self.database_url) as conn:
            stored = sorted(eval_id for (eval_id,) in conn.execute("SELECT eval_id FROM evaluations").fetchall())
            return stored == sorted(self.eval_ids) and len(conn.execute("SELECT 1 FROM dead_letters").fetchall()) == 1


def queued(eval_id: str) -> dict[str, str]:
    return {"type": "evaluation:queued", "eval_id": eval_id, "code": "c"}


@contextmanager
def heard(client: redis.Redis) -> Iterator[list[tuple[str, str]]]:
    """The channel and the evaluation of everything that is published meanwhile, filled in at the end."""
    found: list[tuple[str, str]] = []
    with client.pubsub() as listening:
        listening.psubscribe("*")
        assert listening.get_message(timeout=5)
        yield found
        while (message := listening.get_message(timeout=2)) is not None:
            channel, data = message["channel"].decode(), message["data"]
            if "storage:" in channel:  # Other tests use other databases of this server.
                found.append((channel, json.loads(data)["eval_id"]))


@pytest.mark.parametrize("namespaces", [("dramatiq", "other"), ("one", "{two}")], ids=["default", "named"])
def test_two_evalstores_on_one_redis_neither_see_nor_hear_each_other(
    namespaces: tuple[str, str],
    shared_postgres: Postgres,
    migrated: str,
    redis_url: str,
    start_api: Callable[..., Any],
    tmp_path: Path,
) -> None:
    client = redis.Redis.from_url(redis_url)
    with new_database(shared_postgres, migrated) as first, new_database(shared_postgres, migrated) as second:
        both = [
            Evalstore(namespace, url, redis_url, tmp_path / f"evalstore-{number}")
            for number, (namespace, url) in enumerate(zip(namespaces, (first, second), strict=True))
        ]
        try:
            with heard(client) as published:
                for each in both:
                    each.workers.start()
                    each.use(start_api(**each.environment))
                for each in both:
                    wait_until(each.is_done, what=f"all is stored, and the bad message is a dead letter: {each.namespace}")
            expect_apart(both, published, client)
        finally:
            for each in both:
                each.workers.kill()
    client.close()


def expect_apart(both: list[Evalstore], published: list[tuple[str, str]], client: redis.Redis) -> None:
    for each in both:
        names = Names(each.namespace)
        channel = f"{names.prefix}storage:evaluation:created"
        assert sorted(eval_id for told, eval_id in published if told == channel) == sorted(each.eval_ids)
        read = Confirmations("billing", client=client, namespace=each.namespace, idle_s=1)
        assert sorted(one["eval_id"] for one in read) == sorted(each.eval_ids)
        assert each.command("status", "-o", "json")["workers"] != []
        each.command("cron", "run", "relay_confirmations")
        assert [one["outcome"] for one in each.command("cron", "ls", "-o", "json")].count("ok") >= 1
    assert len(published) == 2 * len(both[0].eval_ids)
    used = {key.decode() for key in client.scan_iter("*")}
    first, second = ({name for name in used if each.namespace in name.split(":")} for each in both)
    assert first & second == set()
    assert Keys.of(both[0].namespace, "evaluations").workers in first
    assert Keys.of(both[1].namespace, "evaluations").workers in second
    rest = used - first - second
    assert {name.split(":")[1] for name in rest} <= {"confirmations", "given", "record"}
    assert rest == set() or both[0].namespace == "dramatiq"
    for name in rest:
        assert not any(eval_id in name for eval_id in both[1].eval_ids)


def test_a_job_is_sent_once_for_a_tick_of_each_namespace(redis_url: str) -> None:
    for namespace in ("one", "two", "one"):
        broker = Broker(url=redis_url, namespace=namespace, middleware=[Retries()])
        schedule.declare(broker, VerifiedDatabase.of(Settings()), Settings())
        Scheduler(jobs(broker)).send_actors(jobs(broker), NOON)
        assert broker.counts("jobs")["ready"] == len(jobs(broker))
        broker.client.close()


def test_the_names_with_the_default_namespace_are_those_of_every_release() -> None:
    names = Names("dramatiq")
    assert [names.stream, names.prefix, names.cached_record("e"), names.given_time("e", "i"), names.seen_version("g", "e")] == [
        "evalstore:confirmations",
        "",
        "evalstore:record:e",
        "evalstore:given:e:i",
        "evalstore:confirmations:g:e",
    ]
    assert [names.last_runs, names.last_successes, names.tick("j", "m")] == [
        "evalstore:dramatiq:jobs:last_runs",
        "evalstore:dramatiq:jobs:last_successes",
        "evalstore:dramatiq:tick:j:m",
    ]


def test_senders_of_several_namespaces_may_share_a_spool_folder() -> None:
    def folder(namespace: str) -> Path | None:
        return folder_of(Settings.from_environment({"EVALSTORE_SPOOL_DIR": "/spool", "EVALSTORE_REDIS_NAMESPACE": namespace}))

    assert folder("") == Path("/spool")
    assert folder("x.spool") == Path("/spool/x.spool.namespace")


@pytest.mark.parametrize("namespace", ["dramatiq", "{dramatiq}", "a", "team-1:grading", "x{y}z", "7", "evalstore", "a" * 64])
def test_a_good_namespace(namespace: str) -> None:
    assert Settings.from_environment({"EVALSTORE_REDIS_NAMESPACE": namespace}).redis_namespace == namespace


@pytest.mark.parametrize(
    "namespace",
    [
        "a b",
        "a*",
        "{a",
        "a}",
        "{}",
        "{a}{b}",
        "a?",
        "[a]",
        "../a",
        "-a",
        "é",
        "a" * 65,
        "x:evalstore:y",
    ],
)
def test_a_bad_namespace_is_named(namespace: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^EVALSTORE_REDIS_NAMESPACE: expected 1 to 64 of "):
        Settings.from_environment({"EVALSTORE_REDIS_NAMESPACE": namespace})
