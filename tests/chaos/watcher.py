"""A service that reads confirmations throughout, and what it must have seen in the end."""

import threading
from collections import defaultdict
from typing import Any

import psycopg
import redis

from models.errors import RedisOutage
from tasks.confirmations import Confirmations
from tests.chaos.world import World, wait_until


class Watcher(threading.Thread):
    """Reads as a service of its own, and goes on whenever Redis is back."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._client = redis.Redis.from_url(world.redis_url, socket_timeout=2)
        self._done = threading.Event()
        self.seen: dict[str, list[tuple[int, str, list[str]]]] = defaultdict(list)
        self.outages = 0

    def run(self) -> None:
        while not self._done.is_set():
            try:
                for confirmation in Confirmations("watcher", client=self._client, idle_s=0.5):
                    self._note(confirmation)
            except RedisOutage:
                self.outages += 1
                self._done.wait(0.1)

    def _note(self, confirmation: dict[str, Any]) -> None:
        seen = confirmation["version"], confirmation["status"], confirmation["event_ids"]
        so_far = self.seen[confirmation["eval_id"]]
        # Its acknowledgement was lost when the server died.
        if not so_far or so_far[-1] != seen:
            so_far.append(seen)

    def audit(self, *, within_s: float = 60) -> None:
        """For each evaluation: ascending versions, every event's id, and the last one is as the record is."""
        with psycopg.connect(self._world.database_url) as conn:
            records = {name: (version, status) for name, version, status in conn.execute(_RECORDS)}
            logged = {name: set(event_ids) for name, event_ids in conn.execute(_LOGGED)}
        try:
            wait_until(lambda: self._last() == records, within_s=within_s, what="every record's last version is confirmed")
        except AssertionError as error:
            late = {name: record for name, record in records.items() if self._last().get(name) != record}
            raise AssertionError(f"{error}; of {len(late)} it was not, as of {list(late.items())[:3]}") from None
        self._done.set()
        self.join()
        for name, seen in self.seen.items():
            versions = [version for version, _, _ in seen]
            assert versions == sorted(set(versions)), f"{name}: versions {versions}"
            told = [event_id for _, _, event_ids in seen for event_id in event_ids]
            assert sorted(told) == sorted(logged[name]), f"{name}: told of {told}, and not {logged[name]}"

    def _last(self) -> dict[str, tuple[int, str]]:
        return {name: seen[-1][:2] for name, seen in dict(self.seen).items() if seen}


_RECORDS = "SELECT eval_id, version, status FROM evaluations"
_LOGGED = "SELECT eval_id, array_agg(event_id::text) FROM evaluation_events GROUP BY eval_id"
