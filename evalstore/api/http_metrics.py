"""The metrics of the service. Labels hold no ids: a path is counted by its template."""

from collections.abc import Iterable, Mapping
from typing import Final

from starlette.types import Scope

from evalstore import hooks
from evalstore.storage.event_store import Stored
from evalstore.telemetry import process_registry
from evalstore.telemetry.counters import Counters, Schema, Series, counted_by
from evalstore.telemetry.exposition import Exposition
from models.logs import EventLogger
from models.settings import Settings

log = EventLogger("evalstore.api")

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
_STATUSES: Final = (
    *(0, 200, 201, 202, 204, 206, 304, 307, 400, 401, 403, 404, 405, 406, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417),
    *(422, 428, 429, 431, 500, 501, 502, 503, 504),
)
_STUCK_S: Final = 20.0


class ApiMetrics:
    """The metrics of one process. The exposition adds up the metrics of its group: `uvicorn --workers` starts several
    processes.

    `routes`: each method and path template of the service.
    """

    def __init__(self, settings: Settings, routes: Iterable[tuple[str, str]]) -> None:
        self._settings = settings
        known = sorted(set(routes))
        values = {
            "method": [*_METHODS, "other"],
            "route": [*sorted({path for _, path in known}), "unknown"],
            "status": [*map(str, _STATUSES), "other"],
            "hook": hooks.names(),
        }
        self._values = {name: frozenset(each) for name, each in values.items()}
        self.layout = Schema(counted_by("api"), values)
        self.counters = Counters(self.layout)
        always: set[Series] = {("evalstore_http_request_duration_seconds", key) for key in known}
        always |= {("evalstore_http_requests_total", (*key, status)) for key in known for status in ("200", "500", "503")}
        self._always = frozenset(always)
        self._exposition = self._expose(None)
        self.group: process_registry.Group | None = None

    def _expose(self, group: process_registry.Group | None) -> Exposition:
        def totals() -> list[float]:
            return group.totals(self.layout) if group else self.layout.numbers(self.counters.data())

        return Exposition("api", self.layout, totals, group, self._settings, always=self._always)

    def share(self) -> None:
        """Join the group of processes that share their counts."""
        try:
            self.group = process_registry.join("api", self.counters, self._settings.runtime_dir)
        except process_registry.RegistryUnavailable as error:
            log.warning("metrics_local_only", error=error)
        self._exposition = self._expose(self.group)

    def heartbeat(self, connections: Mapping[str, int], busy_threads: int, *, waiting: int, streams: int) -> None:
        """Set the gauges. Without a call for _STUCK_S, /health/live calls the event loop stuck."""
        self.counters.set_deadline(_STUCK_S)
        for state, count in connections.items():
            self.counters.set("evalstore_database_connections", state, to=count)
        self.counters.set("evalstore_http_threads_busy", to=busy_threads)
        self.counters.set("evalstore_http_followers", "wait", to=waiting)
        self.counters.set("evalstore_http_followers", "stream", to=streams)

    def request(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answered request."""
        method = self._listed("method", scope["method"], "other")
        route = self._listed("route", getattr(scope.get("route"), "path", "unknown"), "unknown")
        self.counters.add("evalstore_http_requests_total", method, route, self._listed("status", str(status), "other"))
        self.counters.observe("evalstore_http_request_duration_seconds", method, route, value=seconds)

    def _listed(self, label: str, value: str, otherwise: str) -> str:
        return value if value in self._values[label] else otherwise

    def read(self, source: str) -> None:
        """Count a record read from `memory`, `redis` or the `database`."""
        self.counters.add("evalstore_http_record_reads_total", source)

    def rate_check(self, outcome: str) -> None:
        """Count a request of a key with a rate: `allowed`, `refused` or `unchecked`."""
        self.counters.add("evalstore_http_rate_checks_total", outcome)

    def events(self, outcome: str, count: int = 1) -> None:
        """Count events that were `applied`, `duplicate`, `reused`, `invalid` or `accepted`."""
        self.counters.add("evalstore_http_events_total", outcome, by=count)

    def stored(self, stored: Stored) -> None:
        """Count second endings of attempts, and records that were rebuilt from the log."""
        self.counters.add("evalstore_conflicting_results_total", by=stored.conflicting_results)
        for reason, count in stored.rebuilt.items():
            self.counters.add("evalstore_merge_states_rebuilt_total", reason, by=count)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition and its media type, in the format that an Accept header asks for."""
        return self._exposition.text(accept)
