"""Valkeys that replace each other: a pair under three Sentinels, and a cluster of three primaries and three replicas."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import redis
from redis.crc import key_slot

from evalstore.local.servers import Valkey, free_port
from tests.polling import looks

PASSWORD = "of-all-servers"
SLOT = key_slot(b"{dramatiq}")


def until(is_so: Any, *, within_s: float = 20.0, what: str) -> None:
    """Poll until that is true. An error of Redis, or a primary that is not there now, counts as false."""
    for _ in looks(within_s):
        with suppress(redis.RedisError, ValueError):
            if is_so():
                return
    raise AssertionError(f"within {within_s:g} s: {what}")


class Node(Valkey):
    """A Valkey with the password of its group."""

    defaults: ClassVar = {**Valkey.defaults, "primaryauth": PASSWORD, "repl-diskless-sync-delay": "0"}

    def __init__(self, folder: Path, **settings: str) -> None:
        super().__init__(folder, settings={name.replace("_", "-"): value for name, value in settings.items()})
        folder.mkdir(parents=True)
        (folder / "password").write_text(PASSWORD)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @contextmanager
    def client(self) -> Iterator[Any]:
        with redis.Redis.from_url(self.url(), socket_timeout=5) as client:
            yield client

    def run(self, *command: str | int) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def role(self) -> str:
        return str(self.run("ROLE")[0].decode())


class Sentinel(Valkey):
    """Watches a primary by the name `main`. It keeps its own configuration file."""

    def __init__(self, folder: Path, primary: Node, password: str = "") -> None:
        super().__init__(folder)
        self._primary, self._own_password = primary, password

    def url(self, db: int = 0) -> str:  # noqa: ARG002 - a Sentinel has no databases
        return f"redis://:{self._own_password}@127.0.0.1:{self.port}"

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data.mkdir(mode=0o700, exist_ok=True)
        file = self.folder / "sentinel.conf"
        if not file.exists():
            lines = [
                f"port {self.port}",
                "bind 127.0.0.1",
                f'dir "{self.data}"',
                f"sentinel monitor main 127.0.0.1 {self._primary.port} 2",
                f"sentinel auth-pass main {PASSWORD}",
                "sentinel down-after-milliseconds main 1000",
                "sentinel failover-timeout main 6000",
                *([f"requirepass {self._own_password}"] if self._own_password else []),
            ]
            file.write_text("\n".join(lines) + "\n")
        return self._supervise([self.binary(), file, "--sentinel"])


class SentinelGroup:
    """A primary and a replica under three Sentinels."""

    def __init__(self, folder: Path) -> None:
        self.nodes = [Node(folder / f"node-{number}") for number in range(2)]
        self.sentinels = [Sentinel(folder / f"sentinel-{number}", self.nodes[0]) for number in range(3)]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://default:{PASSWORD}@{hosts}/main/0"

    def __enter__(self) -> Self:
        for node in self.nodes:
            self._stack.enter_context(node)
        primary, replica = self.nodes
        replica.run("REPLICAOF", *primary.address)
        until(lambda: b"connected" in replica.run("ROLE"), what="the replica is connected")
        for sentinel in self.sentinels:
            self._stack.enter_context(sentinel)
        until(self._is_watched, what="the Sentinels know each other and the replica")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _is_watched(self) -> bool:
        for sentinel in self.sentinels:
            with redis.Redis.from_url(sentinel.url()) as client:
                state: Any = client.execute_command("SENTINEL", "MASTER", "main")
            if (state[b"num-other-sentinels"], state[b"num-slaves"], state[b"flags"]) != (b"2", b"1", b"master"):
                return False
        return True

    def primary(self) -> Node:
        """Return the primary that all running Sentinels name."""
        found = set()
        for sentinel in self.sentinels:
            if sentinel.running:
                with redis.Redis.from_url(sentinel.url()) as client:
                    _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
                found.add(int(port))
        [node] = [node for node in self.nodes if {node.port} == found and node.role() == "master"]
        return node

    def fail_over(self, *options: str) -> None:
        """Order a failover. Raises while one is going on."""
        with redis.Redis.from_url(self.sentinels[0].url()) as client:
            client.execute_command("SENTINEL", "FAILOVER", "main", *options)


class Cluster:
    """Three primaries with a replica each. Its nodes may be killed, and started again."""

    slot = SLOT

    def __init__(self, folder: Path) -> None:
        common = {"cluster_enabled": "yes", "cluster_node_timeout": "1500", "cluster_replica_validity_factor": "0"}
        self.nodes = [Node(folder / f"node-{number}", cluster_port=str(free_port(0)), **common) for number in range(6)]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return f"redis+cluster://default:{PASSWORD}@" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:3])

    def __enter__(self) -> Self:
        for node in self.nodes:
            self._stack.enter_context(node)
        first, *others = self.nodes
        for node in others:
            first.run("CLUSTER", "MEET", *node.address, int(node.settings["cluster-port"]))
        limits = [0, 5461, 10923, 16384]
        for number in range(3):
            self.nodes[number].run("CLUSTER", "ADDSLOTSRANGE", limits[number], limits[number + 1] - 1)
        until(
            lambda: all(node.run("CLUSTER", "NODES").count(b"\n") == 6 for node in self.nodes), what="the nodes know each other"
        )
        for number in range(3):
            self.nodes[3 + number].run("CLUSTER", "REPLICATE", self.id(self.nodes[number]))
        until(self.is_well, what="the cluster is well")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def id(self, node: Node) -> str:
        return str(node.run("CLUSTER", "MYID").decode())

    def is_well(self) -> bool:
        """Whether all nodes know one owner for each slot, and its replica is connected."""
        states = [node.run("CLUSTER", "INFO") for node in self.nodes]
        return (
            all(b"cluster_state:ok" in state for state in states)
            and len({self._view(node) for node in self.nodes}) == 1
            and len(self._view(self.nodes[0]).split()) == 6
            and all(node.role() == "master" or b"connected" in node.run("ROLE") for node in self.nodes)
        )

    def _view(self, node: Node) -> str:
        slots = node.run("CLUSTER", "SLOTS")
        return " ".join(str(server[1]) for entry in sorted(slots, key=str) for server in sorted(entry[2:], key=str))

    def owner(self, slot: int = SLOT) -> Node:
        """Return the owner of a slot that most running nodes name."""
        votes: list[int] = []
        for node in self.nodes:
            if node.running:
                votes += [entry[2][1] for entry in node.run("CLUSTER", "SLOTS") if int(entry[0]) <= slot <= int(entry[1])]
        port = max(set(votes), key=votes.count)
        [node] = [node for node in self.nodes if node.port == port and node.running]
        return node

    def replica(self) -> Node:
        """Return the replica of the owner."""
        owner = self.owner().port
        [node] = [node for node in self.nodes if node.running and node.role() == "slave" and node.run("ROLE")[2] == owner]
        return node

    def move_slot(self, to: Node, *, hold: Any = None) -> None:
        """Move the slot key by key, as `valkey-cli --cluster reshard` does. `hold` is called in the middle."""
        source = self.owner()
        to.run("CLUSTER", "SETSLOT", SLOT, "IMPORTING", self.id(source))
        source.run("CLUSTER", "SETSLOT", SLOT, "MIGRATING", self.id(to))
        if hold:
            hold()
        while keys := source.run("CLUSTER", "GETKEYSINSLOT", SLOT, 100):
            source.run("MIGRATE", *to.address, "", 0, 5000, "REPLACE", "AUTH", PASSWORD, "KEYS", *keys)
        for node in (to, source, *self.nodes):
            if node.running and node.role() == "master":
                node.run("CLUSTER", "SETSLOT", SLOT, "NODE", self.id(to))
