"""Find the Redis server that holds a namespace: the primary that Sentinel names, or the owner of the slot in a cluster.

Every connection asks when it connects. It disconnects, and asks again, when its server turns out to be another's replica, or
not to own the slot. https://redis.io/docs/latest/develop/reference/sentinel-clients/,
https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import redis
from redis import ResponseError
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MasterDownError, MovedError, ReadOnlyError, TryAgainError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from models import threads
from models.addresses import RedisAddress, parse_redis_url

Node = tuple[str, int]

# The longest step of one question: there are other servers to ask.
_STEP_S: Final = 0.5
_REFRESH_S: Final = 1.0
# A frozen server accepts connections and says nothing. It may be replaced by now.
_HANDSHAKE_S: Final = 1.0
_RELOCATED: Final = (AskError, MovedError, ClusterDownError, TryAgainError, ReadOnlyError, MasterDownError)
# BLMOVE and XREADGROUP end with this error in a primary that becomes a replica. redis-py has no class for it.
_UNBLOCKED: Final = "UNBLOCKED"
_UNSUPPORTED: Final = ("unknown command", "cluster support disabled", "unknown subcommand")


class Misaddressed(redis.ConnectionError):
    """The address names servers of another kind, or a primary that no Sentinel watches. Waiting does not help."""


class Locator:
    """The servers of one address. Any thread may use it.

    A server that answers is asked first the next time, and a server that does not, or that named a wrong one, last.
    """

    def __init__(self, address: RedisAddress, namespace: str, connection_class: Any, options: dict[str, Any]) -> None:
        self.address = address
        self._slot = key_slot(f"{namespace}:".encode())
        self._nodes = list(address.nodes)
        self._connection_class, self._options = connection_class, options
        self.current: Node | None = None
        self._asked_at = 0.0

    def find(self) -> Node:
        """Return host and port of the server. Raises redis.ConnectionError (retry), or Misaddressed."""
        self._asked_at = time.monotonic()
        problems: dict[str, Exception] = {}
        for node in list(self._nodes):
            try:
                found = self._ask(node)
            except (redis.ConnectionError, redis.TimeoutError, ResponseError, OSError) as error:
                problems[f"{node[0]}:{node[1]}"] = error
                self._ask_last(node)
                continue
            self._ask_first(node)
            self.current = found
            return found
        of_settings = [error for error in problems.values() if isinstance(error, Misaddressed)]
        if len(of_settings) == len(problems):
            raise of_settings[0]
        raise redis.ConnectionError("; ".join(f"{node}: {error}" for node, error in problems.items()))

    def refresh(self) -> None:
        """Ask Sentinel again, in another thread, unless it was asked within _REFRESH_S.

        After `SENTINEL FAILOVER`, and behind a broken network, an old primary accepts writes for ten seconds or longer. These
        are lost when it becomes a replica. A server of a cluster itself says that it lost a slot.
        """
        if self.address.kind == "sentinel" and time.monotonic() - self._asked_at > _REFRESH_S:
            self._asked_at = time.monotonic()
            threads.start(self._find_quietly)

    def _find_quietly(self) -> None:
        with suppress(redis.RedisError):
            self.find()

    def distrust(self, error: Exception) -> None:
        """Ask another server first the next time. If `error` names the owner of the slot, ask that server."""
        if self._nodes:
            self._ask_last(self._nodes[0])
        if isinstance(error, MovedError) and error.host:
            self._ask_first((error.host, error.port))

    def _ask(self, node: Node) -> Node:
        is_sentinel = self.address.kind == "sentinel"
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.primary) if is_sentinel else ("CLUSTER", "SLOTS")
        connection = self._connection_class(**self._options | {"host": node[0], "port": node[1]})
        try:
            connection.connect()
            connection.send_command(*command)
            reply = connection.read_response()
        except redis.AuthenticationError:
            if not is_sentinel:
                raise
            raise Misaddressed(f"{node[0]}:{node[1]} refuses the sentinel_password of the address, or asks for one") from None
        except ResponseError as error:
            if any(text in str(error) for text in _UNSUPPORTED):
                raise Misaddressed(f"{node[0]}:{node[1]} is no {'Sentinel' if is_sentinel else 'node of a cluster'}") from None
            raise
        finally:
            connection.disconnect()
        return self._primary(reply) if is_sentinel else self._owner(reply, node)

    def _primary(self, reply: Any) -> Node:
        if reply is None:
            raise Misaddressed(f"no Sentinel knows a primary named {self.address.primary}")
        return _text(reply[0]), int(reply[1])

    def _owner(self, reply: Any, asked: Node) -> Node:
        nodes = {tuple(map(int, entry[:2])): [_node(part, asked) for part in entry[2:]] for entry in reply}
        self._learn(node for entry in nodes.values() for node in entry if node)
        for (first, last), servers in nodes.items():
            if first <= self._slot <= last and servers[0]:
                return servers[0]
        raise redis.ConnectionError(f"no server of the cluster owns slot {self._slot}, that of the namespace")

    def _learn(self, nodes: Iterable[Node]) -> None:
        """Remember nodes of the cluster: those of the address may all be replaced while this process runs."""
        self._nodes += [node for node in dict.fromkeys(nodes) if node not in self._nodes]

    def _ask_first(self, node: Node) -> None:
        if self._nodes[:1] != [node]:
            self._nodes = [node, *(other for other in self._nodes if other != node)]

    def _ask_last(self, node: Node) -> None:
        self._nodes = [*(other for other in self._nodes if other != node), node]


def _node(part: Any, asked: Node) -> Node | None:
    """Return a node in a reply to CLUSTER SLOTS, or None if the cluster does not know its name ("?")."""
    host = _text(part[0] or asked[0])
    return None if host == "?" else (host, int(part[1]))


def _text(reply: str | bytes) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply


class LocatedConnection(AbstractConnection):
    """Mix-in for redis-py connections to the server that a Locator finds."""

    def __init__(self, *, locator: Locator, **options: Any) -> None:
        super().__init__(**options)
        self._locator = locator

    def connect(self) -> None:
        """Connect unless connected. The pool calls this for each use, so no transaction is open."""
        self._locator.refresh()
        if self._sock and (self.host, self.port) != self._locator.current:
            self.disconnect()  # Another connection found that the server changed. A frozen one would cost another time-out.
        super().connect()  # type: ignore[no-untyped-call]

    def _connect(self) -> Any:
        self.host, self.port = self._locator.find()
        try:
            return super()._connect()  # type: ignore[safe-super,no-untyped-call]
        except Exception as error:
            self._locator.distrust(error)
            raise

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Authenticate, and check what Sentinel said: it may not know of a failover yet."""
        usual_s = self.socket_timeout
        self.socket_timeout = min(usual_s or _HANDSHAKE_S, _HANDSHAKE_S)
        try:
            super().on_connect_check_health(check_health)
            self._check_role()
        finally:
            self.socket_timeout = usual_s

    def _check_role(self) -> None:
        if self._locator.address.kind != "sentinel":
            return  # In a cluster, a replica does not answer.
        try:
            self.send_command("ROLE", check_health=False)  # type: ignore[no-untyped-call]
            role = self.read_response()[0]
        except ResponseError:
            return  # The user may not ask. Then the first write shows it.
        if _text(role) != "master":
            self._leave(redis.ConnectionError("the server is a replica"))

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply. One that says that another server is responsible becomes a ConnectionError, after which callers retry.

        ASK and TRYAGAIN as well: while a slot moves key by key, both servers refuse a script some of whose keys are missing.
        """
        try:
            return super().read_response(*args, **options)
        except ResponseError as error:
            if isinstance(error, _RELOCATED) or str(error).startswith(_UNBLOCKED):
                self._leave(error)
            raise

    def _leave(self, error: Exception) -> None:
        server = f"{self.host}:{self.port}"
        self.disconnect()  # type: ignore[no-untyped-call]
        self._locator.distrust(error)
        raise redis.ConnectionError(f"{server} is not responsible: {type(error).__name__} {error}") from error


def locate(address: RedisAddress, namespace: str, options: dict[str, Any]) -> redis.Redis:
    """Return a client for the server of `namespace`, with redis-py's `options`. Raises ValueError for a bad namespace."""
    if address.kind == "cluster" and "{" not in namespace:
        raise ValueError(f"in a cluster the namespace needs a part in braces, like {{{namespace}}}")
    # A notice of maintenance would send connections back to the host of the address.
    client = redis.Redis.from_url(address.url, maint_notifications_config=MaintNotificationsConfig(enabled=False), **options)
    pool = client.connection_pool
    plain, asking = pool.connection_class, pool.connection_kwargs.copy()
    step_s = min(asking.get("socket_connect_timeout") or _STEP_S, _STEP_S)
    asking |= {"socket_timeout": step_s, "socket_connect_timeout": step_s, "decode_responses": False}
    asking |= {"health_check_interval": 0, "retry": Retry(NoBackoff(), 0), "retry_on_error": []}
    if address.kind == "sentinel":
        asking |= {"db": 0, "username": address.sentinel_user, "password": address.sentinel_password}
    pool.connection_kwargs["locator"] = Locator(address, namespace, plain, asking)
    pool.connection_class = type("LocatedConnection", (LocatedConnection, plain), {})
    return client


def check(url: str, namespace: str) -> None:
    """Raise Misaddressed if the servers of an address are of another kind, or if no Sentinel watches its primary.

    Other errors may pass. Takes about 1 s at most for each server of the address.
    """
    client = locate(parse_redis_url(url), namespace, {})
    try:
        client.connection_pool.connection_kwargs["locator"].find()
    except Misaddressed:
        raise
    except redis.RedisError:
        pass
