"""Every process through Sentinel and through a cluster, and addresses that name something else."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker

from evalstore.local.servers import Valkey
from models.errors import RedisOutage
from models.settings import Settings
from tasks.actor import store_evaluation
from tasks.broker import SendingBroker
from tasks.confirmations import Confirmations
from tasks.connections import connect
from tests.chaos.world import Workers, wait_until
from tests.integration.commands import python
from tests.redis_groups import PASSWORD, Cluster, Sentinel, SentinelGroup, until

ROOT = Path(__file__).parents[2]
E = "/storage/evaluations"


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelGroup]:
    with SentinelGroup(tmp_path_factory.mktemp("sentinels")) as group:
        yield group


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as group:
        yield group


def queued(eval_id: str) -> dict[str, Any]:
    return {"type": "evaluation:queued", "eval_id": eval_id, "code": "c"}


def command(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python(), "-m", *words], env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
def test_every_process_works_through_the_address(
    kind: str, request: pytest.FixtureRequest, database_url: str, start_api: Callable[..., Any], tmp_path: Path
) -> None:
    group: SentinelGroup | Cluster = request.getfixturevalue(kind)
    env = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": group.url, "EVALSTORE_METRICS_PORT": "0"}
    namespace = Settings.from_environment(env).redis_namespace
    workers = Workers(tmp_path, env, "worker.tasks", 1, 2)
    workers.start()
    try:
        client = connect(group.url, namespace, socket_timeout=2)
        stock = RedisBroker(client=client, namespace=namespace)
        for event in (queued("stock"), {"eval_id": "bad"}):
            stock.enqueue(dramatiq.Message("evaluations", "store_evaluation", (event,), {}, {}))
        sender = SendingBroker(url=group.url, namespace=namespace, middleware=[])
        sender.enqueue(store_evaluation.message(queued("ours")))
        sender.enqueue(store_evaluation.message(queued("later")), delay=200)
        sender.enqueue_many([store_evaluation.message(queued(f"bulk-{number}")) for number in range(200)])
        sender.enqueue_many([store_evaluation.message(queued("durable"))], durable=True)
        api = start_api(**env)
        assert api.both.post(E, json={"eval_id": "http", "code": "c"}).status_code == 201
        asked = api.both.post(E, json={"eval_id": "async", "code": "c"}, headers={"Prefer": "respond-async"})
        assert asked.status_code == 202
        assert api.nobody.get("/health/ready").json()["redis"] == "ready"
        assert command(env, "evalstore.cli.app", "cron", "run", "mark_lost_evaluations").returncode == 0

        def is_done() -> bool:
            with psycopg.connect(database_url) as conn:
                counts = "SELECT (SELECT count(*) FROM evaluations), (SELECT count(*) FROM dead_letters)"
                return conn.execute(counts).fetchone() == (206, 1)

        wait_until(is_done, what="all is stored, and the bad message is a dead letter")
        confirmed = {one["eval_id"] for one in Confirmations(kind, client=client, namespace=namespace, idle_s=3)}
        assert len(confirmed) == 206
        assert api.read.get(f"{E}/async").status_code == 200
        status = json.loads(command(env, "evalstore.cli.app", "status", "-o", "json").stdout)
        assert PASSWORD not in json.dumps(status)
        assert command(env, "evalstore.cli.app", "health", "--ready").returncode == 0
        assert "1 dead again" in command(env, "evalstore.cli.app", "dlq", "redrive", "--all", "--yes").stderr
        sender.close()
        client.close()
    finally:
        workers.stop()


def test_a_name_that_no_sentinel_knows_is_refused_at_the_start(sentinels: SentinelGroup, database_url: str) -> None:
    url = sentinels.url.replace("/main/", "/other/")
    done = command({"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": url}, "evalstore.api")
    assert (done.returncode, done.stderr) == (2, "EVALSTORE_REDIS_URL: no Sentinel knows a primary named other\n")
    with pytest.raises(RedisOutage, match="no Sentinel knows a primary named other") as error:
        SendingBroker(url=url, middleware=[], timeout_s=1).enqueue(store_evaluation.message(queued("x")))
    assert PASSWORD not in str(error.value)


@pytest.mark.parametrize(
    ("address", "said"), [("redis+sentinel://{}/main/0", "no Sentinel"), ("redis+cluster://{}", "no node of a cluster")]
)
def test_a_plain_server_at_the_address_is_refused_at_the_start(
    address: str, said: str, shared_valkey: Valkey, database_url: str
) -> None:
    host = f"127.0.0.1:{shared_valkey.port}"
    secret = f"sentinel_password={shared_valkey.password}" if "sentinel" in address else ""
    url = address.format(f"default:{shared_valkey.password}@{host}") + (f"?{secret}" if secret else "")
    done = command({"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": url}, "evalstore.api")
    assert (done.returncode, done.stderr) == (2, f"EVALSTORE_REDIS_URL: {host} is {said}\n")


def test_a_slot_without_owner_is_an_outage_until_it_has_one(cluster: Cluster) -> None:
    broker = SendingBroker(url=cluster.url, namespace="{dramatiq}", middleware=[], timeout_s=1)
    owner = cluster.owner()
    for node in cluster.nodes:
        node.run("CLUSTER", "DELSLOTS", cluster.slot)
    with pytest.raises(RedisOutage, match=f"no server of the cluster owns slot {cluster.slot}") as error:
        broker.enqueue(store_evaluation.message(queued("x")))
    assert PASSWORD not in str(error.value)
    owner.run("CLUSTER", "ADDSLOTS", cluster.slot)
    until(cluster.is_well, what="the cluster is well")
    broker.enqueue(store_evaluation.message(queued("x")))
    broker.flush("evaluations")
    broker.close()


def test_a_namespace_without_braces_is_refused_in_a_cluster(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match=r"needs a part in braces, like \{other\}"):
        SendingBroker(url=cluster.url, namespace="other", middleware=[])


def test_a_sentinel_with_a_password_of_its_own(sentinels: SentinelGroup, tmp_path: Path) -> None:
    with Sentinel(tmp_path / "sentinel", sentinels.nodes[0], password="its-own") as sentinel:
        url = f"redis+sentinel://default:{PASSWORD}@127.0.0.1:{sentinel.port}/main/0"
        with (
            connect(url, "dramatiq") as refused,
            pytest.raises(redis.ConnectionError, match="sentinel_password") as error,
        ):
            refused.ping()
        assert PASSWORD not in str(error.value)
        with connect(f"{url}?sentinel_password=its-own", "dramatiq") as client:
            assert client.ping()


def test_servers_that_do_not_answer_cost_one_wait(sentinels: SentinelGroup) -> None:
    """The first server of the address is frozen. After one wait it is asked last."""
    frozen = sentinels.sentinels[0]
    frozen.freeze()
    try:
        with connect(sentinels.url, "dramatiq", socket_timeout=2) as client:
            assert client.ping()
            locator = client.connection_pool.connection_kwargs["locator"]
            assert locator.find() == sentinels.nodes[0].address
            assert locator._nodes[-1] == ("127.0.0.1", frozen.port)
    finally:
        frozen.thaw()
