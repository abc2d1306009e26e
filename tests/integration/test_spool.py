"""Redis is taken away from real senders and given back: what `send` took arrives, once, in order for each evaluation."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from dramatiq import Message

from evalstore.local.servers import Valkey
from models.errors import RedisOutage, SpoolFull
from models.settings import settings
from tasks import store_evaluation, store_evaluations
from tasks.broker import SendingBroker, broker
from tasks.spool import Spool
from tests.integration.commands import python

Eventually = Callable[..., None]
ROOT = Path(__file__).parents[2]
QUEUE, BODIES = "dramatiq:evaluations", "dramatiq:evaluations.msgs"
PATIENCE_S = 1.0
SLACK_S = 0.7  # For a busy machine.


def event(eval_id: str = "e", number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"type": "evaluation:queued", "eval_id": eval_id, "code": "print(1)", "metadata": {"n": number}, **fields}


def arrived(url: str) -> list[tuple[str, int]]:
    """Evaluation and number of every event in Redis, in the order of the queue; every id is there once."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        ids: list[str] = client.lrange(QUEUE, 0, -1)
        bodies: dict[str, str] = client.hgetall(BODIES)
    assert sorted(ids) == sorted(bodies)
    sent = [json.loads(bodies[redis_id])["args"][0] for redis_id in ids]
    event_ids = [each["event_id"] for each in sent]
    assert len(set(event_ids)) == len(event_ids)
    return [(each["eval_id"], each["metadata"]["n"]) for each in sent]


def by_evaluation(events: list[tuple[str, int]]) -> dict[str, list[int]]:
    found = defaultdict(list)
    for eval_id, number in events:
        found[eval_id].append(number)
    return dict(found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def environment(valkey_server: Valkey, folder: Path) -> dict[str, str]:
    """What a sender is started with."""
    return {
        "EVALSTORE_REDIS_URL": valkey_server.url(),
        "EVALSTORE_SEND_TIMEOUT_S": str(PATIENCE_S),
        "EVALSTORE_SPOOL_DIR": str(folder),
    }


@pytest.fixture
def spool(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Spool]:
    """This process sends with a spool."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    broker.cache_clear()
    made = broker().spool
    assert made
    yield made
    broker().client.close()
    settings.cache_clear()
    broker.cache_clear()


def evalstore(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [*python(), "-m", "evalstore.cli.app", "spool", *words]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


# ---- without a spool: a typed error, soon


def refused(server: Valkey) -> None:
    server.stop()


def frozen(server: Valkey) -> None:
    server.freeze()


def full(server: Valkey) -> None:
    with redis.Redis.from_url(server.url()) as client:
        client.config_set("maxmemory", 1)


def read_only(server: Valkey) -> None:
    with redis.Redis.from_url(server.url()) as client:
        client.replicaof("127.0.0.1", "1")


@pytest.mark.parametrize("outage", [refused, frozen, full, read_only])
@pytest.mark.parametrize("connected", [True, False])
def test_an_outage_is_told_within_the_time_that_is_set(
    valkey_server: Valkey, outage: Callable[[Valkey], None], connected: bool
) -> None:
    sender = SendingBroker(url=valkey_server.url(), timeout_s=PATIENCE_S, middleware=[])
    if connected:
        sender.enqueue(store_evaluation.message(event()))
    outage(valkey_server)
    told_in_time(sender)


def test_a_server_that_loads_its_data_is_an_outage_told_within_the_time_that_is_set(tmp_path: Path) -> None:
    with Valkey(tmp_path / "valkey", settings={"appendonly": "no"}) as server:
        with redis.Redis.from_url(server.url()) as client:
            client.mset({f"key-{number}": "x" * 100 for number in range(4000)})
            client.save()
        server.kill()
        server.settings |= {"key-load-delay": "1000", "loading-process-events-interval-bytes": "1024"}
        loading = threading.Thread(target=server.start)
        loading.start()
        sender = SendingBroker(url=server.url(), timeout_s=PATIENCE_S, middleware=[])
        told = ""
        while "loading" not in told:  # Connections are refused until the server listens.
            told = told_in_time(sender)
        loading.join()


@pytest.mark.parametrize("host", ["nowhere.invalid", "240.0.0.1", "10.255.255.1"])
def test_a_host_that_is_not_there_is_an_outage_told_within_the_time_that_is_set(host: str) -> None:
    told_in_time(SendingBroker(url=f"redis://{host}:6379/0", timeout_s=PATIENCE_S, middleware=[]))


def test_a_server_that_is_slow_at_every_step_is_an_outage_told_within_the_time_that_is_set() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer_slowly, args=(listener,), daemon=True).start()
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0?protocol=2"
        told_in_time(SendingBroker(url=url, timeout_s=PATIENCE_S, middleware=[]))


def _answer_slowly(listener: socket.socket) -> None:
    """Each answer comes just before its own time is over; there are at least four."""
    client, _ = listener.accept()
    with client:
        while client.recv(65536):
            time.sleep(PATIENCE_S * 0.45)
            client.sendall(b"-NOSCRIPT again\r\n")


def told_in_time(sender: SendingBroker) -> str:
    began = time.monotonic()
    with pytest.raises(RedisOutage) as error:
        sender.enqueue(store_evaluation.message(event()))
    assert time.monotonic() - began < PATIENCE_S + SLACK_S
    sender.client.close()
    return str(error.value)


# ---- with a spool, in one process


def test_while_redis_is_away_events_are_kept_and_sent_on_in_order_when_it_is_back(
    valkey_server: Valkey, spool: Spool, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    store_evaluation.send(event(number=0))
    valkey_server.stop()
    store_evaluation.send(event(number=1))
    began = time.monotonic()
    for number in range(2, 30):
        store_evaluation.send(event(number=number))
    store_evaluations([event(number=30), event(number=31)])
    assert time.monotonic() - began < PATIENCE_S  # None of them waited for Redis.
    assert spool.status().messages == 31
    eventually(lambda: "are kept in" in caplog.text, what="it is told that events are kept")
    valkey_server.start()
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    store_evaluation.send(event(number=32))
    assert not spool.holds()
    assert arrived(valkey_server.url()) == [("e", number) for number in range(33)]
    assert caplog.text.count("are kept in") == 1


@pytest.mark.parametrize(
    ("outage", "end"),
    [(full, lambda client: client.config_set("maxmemory", 0)), (read_only, lambda client: client.replicaof("NO", "ONE"))],
)
def test_a_redis_that_refuses_writes_is_away_too(
    valkey_server: Valkey, spool: Spool, eventually: Eventually, outage: Callable[[Valkey], None], end: Callable[[Any], None]
) -> None:
    outage(valkey_server)
    store_evaluation.send(event(number=0))
    store_evaluations([event(number=1), event(number=2)])
    with redis.Redis.from_url(valkey_server.url()) as client:
        end(client)
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    assert arrived(valkey_server.url()) == [("e", 0), ("e", 1), ("e", 2)]


def test_what_a_frozen_redis_took_after_all_is_there_once(valkey_server: Valkey, spool: Spool, eventually: Eventually) -> None:
    store_evaluation.send(event(number=0))
    valkey_server.freeze()
    store_evaluation.send(event(number=1))  # The frozen server finds the message in its socket later.
    began = time.monotonic()
    for number in range(2, 20):  # These sends do not wait, because the forwarder waits for Redis.
        store_evaluation.send(event(number=number))
    assert time.monotonic() - began < PATIENCE_S
    valkey_server.thaw()
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    assert arrived(valkey_server.url()) == [("e", number) for number in range(20)]


def test_a_sender_that_starts_with_something_in_the_spool_sends_that_first(
    valkey_server: Valkey, spool: Spool, eventually: Eventually
) -> None:
    for number in range(3):
        message = store_evaluation.message(event(number=number))
        message.options["redis_message_id"] = f"id-{number}"
        spool.append([f"id-{number}", message.encode()])
    store_evaluation.send(event(number=3))
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    assert arrived(valkey_server.url()) == [("e", number) for number in range(4)]


def test_what_is_kept_is_the_message_that_is_sent(valkey_server: Valkey, spool: Spool, eventually: Eventually) -> None:
    valkey_server.stop()
    text = "line\nbreak \x00 \u2028 \ud800 ü " * 5000
    given = store_evaluation.send(event(output=None, code=text))
    valkey_server.start()
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    with redis.Redis.from_url(valkey_server.url()) as client:
        [body] = client.hvals(BODIES)
    there = Message.decode(body)
    assert there.args == tuple(given.args) or list(there.args) == list(given.args)
    assert (there.message_id, there.options) == (given.message_id, given.options)


def test_a_message_that_promises_more_than_a_spool_can_is_not_kept_there(valkey_server: Valkey, spool: Spool) -> None:
    valkey_server.stop()
    with pytest.raises(RedisOutage):
        store_evaluation.send_with_options(args=(event(),), durable=True)
    with pytest.raises(RedisOutage):
        store_evaluations([event()], durable=True)
    with pytest.raises(RedisOutage):
        store_evaluation.send_with_options(args=(event(),), delay=1000)
    with pytest.raises(RedisOutage):  # A redrive is not spooled: an operator expects it now or never.
        broker().enqueue(Message(queue_name="default", actor_name="job", args=(), kwargs={}, options={}))
    assert not spool.holds()


def test_a_spool_without_room_is_an_outage_until_there_is_room(
    valkey_server: Valkey, spool: Spool, eventually: Eventually
) -> None:
    valkey_server.stop()
    store_evaluation.send(event(number=0))
    spool.max_bytes = spool.status().bytes
    began = time.monotonic()
    with pytest.raises(SpoolFull):
        store_evaluation.send(event(number=1))
    assert time.monotonic() - began < PATIENCE_S
    valkey_server.start()
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    store_evaluation.send(event(number=2))
    assert arrived(valkey_server.url()) == [("e", 0), ("e", 2)]


def fill_by_sending(kept: list[tuple[str, int]]) -> None:
    for number in range(1000):
        store_evaluation.send(event(number=number))
        kept.append(("e", number))


def test_a_sender_that_finds_a_full_spool_empties_it(valkey_server: Valkey, spool: Spool, eventually: Eventually) -> None:
    expected = fill(spool, 200)
    spool.max_bytes = 1
    with pytest.raises(SpoolFull):
        store_evaluation.send(event(number=200))
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    assert arrived(valkey_server.url()) == expected


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_refuses_events_whole_and_is_emptied_when_redis_is_back(
    valkey_server: Valkey, spool: Spool, eventually: Eventually
) -> None:
    with small_disk(spool.folder):
        valkey_server.stop()
        kept: list[tuple[str, int]] = []
        with pytest.raises(SpoolFull, match="No space left"):
            fill_by_sending(kept)
        with pytest.raises(SpoolFull):
            store_evaluations([event(number=number) for number in range(1000, 1100)])
        assert len(kept) > 10
        assert spool.status().messages == len(kept)
        valkey_server.start()
        eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
        assert arrived(valkey_server.url()) == kept
        assert spool.status().damaged == 0


# ---- with a spool, in many processes

SENDER = """
import sys
from tasks import store_evaluation
name, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    eval_id = f"{name}-{number % 3}"
    store_evaluation.send({"type": "evaluation:queued", "eval_id": eval_id, "code": "1", "metadata": {"n": number}})
    print(eval_id, number, flush=True)
print("done", flush=True)
sys.stdin.read()
"""


class Sender:
    """A process that sends; `sent` is what it knows to be sent."""

    def __init__(self, environment: dict[str, str], name: str, count: int) -> None:
        command = [*python(), "-c", SENDER, name, str(count)]
        env = os.environ | environment
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.sent: list[tuple[str, int]] = []
        self.done = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            eval_id, _, number = line.strip().partition(" ")
            self.done = eval_id == "done"
            if number:
                self.sent.append((eval_id, int(number)))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def stop(self) -> None:
        self.process.communicate(timeout=20)
        self._reader.join()


@pytest.fixture
def senders(environment: dict[str, str]) -> Iterator[Callable[[int, int], list[Sender]]]:
    """`senders(number, count)` starts that many, each with so many events to send."""
    made: list[Sender] = []

    def start(number: int, count: int) -> list[Sender]:
        made.extend(Sender(environment, f"sender{len(made)}", count) for _ in range(number))
        return made[-number:]

    yield start
    for sender in made:
        sender.kill()
        for pipe in (sender.process.stdin, sender.process.stdout, sender.process.stderr):
            if pipe:
                pipe.close()


def test_many_senders_outlive_outages_one_is_killed_and_everything_it_sent_arrives_once_in_order(
    valkey_server: Valkey,
    senders: Callable[[int, int], list[Sender]],
    environment: dict[str, str],
    folder: Path,
    eventually: Eventually,
) -> None:
    fleet = senders(4, 800)
    eventually(lambda: all(len(sender.sent) > 50 for sender in fleet), within_s=30, what="all are at work")
    valkey_server.kill()
    eventually(lambda: all(len(sender.sent) > 300 for sender in fleet), within_s=30, what="all go on without Redis")
    fleet[0].kill()
    assert not fleet[0].done
    valkey_server.start()
    eventually(lambda: all(sender.done for sender in fleet[1:]), within_s=60, what="all have sent everything")
    eventually(lambda: not list(folder.glob("*.spool")), within_s=30, what="everything is sent on")
    for sender in fleet[1:]:
        sender.stop()
        assert len(sender.sent) == 800

    there = by_evaluation(arrived(valkey_server.url()))
    known = by_evaluation([each for sender in fleet for each in sender.sent])
    for eval_id, numbers in known.items():
        unknown = there[eval_id][len(numbers) :]
        assert there[eval_id][: len(numbers)] == numbers
        assert len(unknown) <= (eval_id.startswith("sender0"))  # Only the last send of the killed sender may be unknown.
    assert list(folder.glob("*.bad")) == []


def test_two_forwarders_at_once_send_everything_once_in_order(
    valkey_server: Valkey, spool: Spool, environment: dict[str, str]
) -> None:
    expected = fill(spool, 3000)
    command = [*python(), "-m", "evalstore.cli.app", "spool", "forward"]
    env = os.environ | environment
    both = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [forwarder.communicate(timeout=60)[1] for forwarder in both]
    assert [forwarder.returncode for forwarder in both] == [0, 0]
    assert sorted(said) == ["0 forwarded\n", "3,000 forwarded\n"]
    assert arrived(valkey_server.url()) == expected


def fill(spool: Spool, number: int) -> list[tuple[str, int]]:
    """Keep that many events, as after an outage in which their sender ended."""
    for start in range(0, number, 100):
        arguments: list[str | bytes] = []
        for place in range(start, start + 100):
            message = store_evaluation.message(event(number=place))
            arguments += [message.message_id, message.copy(options={"redis_message_id": message.message_id}).encode()]
        spool.append(arguments)
    return [("e", place) for place in range(number)]


FORWARDER = """
import os, sys, threading
from tasks.broker import broker
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), 9)).start()
broker().spool.forward(broker().send_spooled)
os.kill(os.getpid(), 9)
"""


def test_a_forwarder_that_is_killed_again_and_again_loses_nothing_and_sends_nothing_twice(
    valkey_server: Valkey, spool: Spool, environment: dict[str, str]
) -> None:
    spool.segment_bytes = 100_000
    expected = fill(spool, 10_000)
    counts = []
    for number in range(100):
        # Each process lives longer than the one before. So it makes progress on any machine, and finishes in the end.
        lives_s = 0.004 * number
        command = [*python(), "-c", FORWARDER, str(lives_s)]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False)
        counts.append(spool.status().messages)
        if not counts[-1]:
            break
    assert len(set(counts)) > 2, "it was never killed in the middle"
    assert arrived(valkey_server.url()) == expected


def test_a_torn_write_is_reported_and_holds_up_nothing(
    valkey_server: Valkey, spool: Spool, environment: dict[str, str], eventually: Eventually
) -> None:
    valkey_server.stop()
    store_evaluation.send(event(number=0))
    [segment] = spool.folder.glob("*.spool")
    with segment.open("ab") as file:
        file.write(segment.read_bytes()[:100])
    store_evaluation.send(event(number=1))
    valkey_server.start()
    eventually(lambda: not spool.holds(), within_s=10, what="everything is sent on")
    assert arrived(valkey_server.url()) == [("e", 0), ("e", 1)]
    assert segment.with_suffix(".bad").exists()
    [shown] = json.loads(evalstore(environment, "status", "-o", "json").stdout)
    assert shown == {"messages": 0, "bytes": 0, "oldest_age_s": None, "damaged": 1}


FORKING = """
import os, sys
from tasks import store_evaluation
def send(name, number):
    store_evaluation.send({"type": "evaluation:queued", "eval_id": name, "code": "1", "metadata": {"n": number}})
send("parent", 0)  # its forwarder is at work from now on
for name in ("child1", "child2"):
    if os.fork() == 0:
        for number in range(20):
            send(name, number)
        os.write(1, b"done\\n")  # in one piece: parent and child write to the same pipe
        sys.stdin.read()
        os._exit(0)
os._exit(0)
"""


def test_children_forked_from_a_sender_send_on_what_they_and_their_parent_kept(
    valkey_server: Valkey, environment: dict[str, str], spool: Spool, eventually: Eventually
) -> None:
    valkey_server.stop()
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout
        assert [parent.stdout.readline(), parent.stdout.readline()] == [b"done\n", b"done\n"]
        valkey_server.start()
        eventually(lambda: not spool.holds(), within_s=15, what="everything is sent on")
    there = by_evaluation(arrived(valkey_server.url()))
    assert there == {"parent": [0], "child1": list(range(20)), "child2": list(range(20))}


# ---- evalstore spool


def test_status_shows_what_waits_without_any_server(valkey_server: Valkey, spool: Spool, environment: dict[str, str]) -> None:
    done = evalstore(environment, "status", "-o", "json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [{"messages": 0, "bytes": 0, "oldest_age_s": None, "damaged": 0}])
    fill(spool, 200)
    valkey_server.stop()
    done = evalstore(environment, "status", "-o", "json")
    [shown] = json.loads(done.stdout)
    assert (done.returncode, shown["messages"], shown["damaged"]) == (0, 200, 0)
    assert shown["bytes"] == sum(path.stat().st_size for path in spool.folder.glob("*.spool"))
    assert 0 < shown["oldest_age_s"] < 60
    assert "200" in evalstore(environment, "status").stdout


def test_forward_says_by_its_exit_status_how_it_went(valkey_server: Valkey, spool: Spool, environment: dict[str, str]) -> None:
    assert evalstore(environment, "forward").returncode == 0  # nothing to do
    expected = fill(spool, 200)
    valkey_server.stop()
    away = evalstore(environment, "forward")
    assert (away.returncode, away.stdout) == (7, "")
    assert "Redis cannot be used" in away.stderr
    assert spool.status().messages == 200
    [segment] = spool.folder.glob("*.spool")
    with segment.open("ab") as file:
        file.write(b"rubbish")
    valkey_server.start()
    partly = evalstore(environment, "forward")
    assert (partly.returncode, partly.stdout) == (4, "")
    assert arrived(valkey_server.url()) == expected
    for word in ("forward", "status"):
        unset = evalstore(environment | {"EVALSTORE_SPOOL_DIR": ""}, word)
        assert (unset.returncode, "EVALSTORE_SPOOL_DIR" in unset.stderr) == (2, True)


def test_forward_watch_goes_on_through_outages_until_it_is_told_to_stop(
    valkey_server: Valkey, spool: Spool, environment: dict[str, str], eventually: Eventually
) -> None:
    valkey_server.stop()
    fill(spool, 200)
    command = [*python(), "-m", "evalstore.cli.app", "spool", "forward", "--watch"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stderr
        assert watch.stderr.readline().startswith("waiting: ")
        valkey_server.start()
        eventually(lambda: not spool.holds(), within_s=15, what="what was there is sent on")
        fill(spool, 100)
        eventually(lambda: not spool.holds(), within_s=15, what="what came later is sent on")
        watch.terminate()
        assert watch.wait(timeout=20) == 0
    assert len(arrived_ids(valkey_server.url())) == 300


def arrived_ids(url: str) -> list[bytes]:
    with redis.Redis.from_url(url) as client:
        ids: list[bytes] = client.lrange(QUEUE, 0, -1)
    return ids
