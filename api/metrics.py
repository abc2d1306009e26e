"""What the service counts. No ids in labels: a path is counted by its template."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import Scope

_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class Metrics:
    """Of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}  # finding one takes longer than counting
        self._requests = Counter(
            "evalstore_http_requests_total",
            "Requests, by the status of their answer; 0 where there was none.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "evalstore_http_request_duration_seconds",
            "From a request's headers to the end of its answer.",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._reads = Counter(
            "evalstore_http_record_reads_total",
            "Records read, by where they came from.",
            ["source"],
            registry=self._registry,
        )
        self._events = Counter(
            "evalstore_http_events_total",
            "Events taken by HTTP, by what became of them.",
            ["outcome"],
            registry=self._registry,
        )

    def request(self, scope: Scope, status: int, seconds: float) -> None:
        """An answered request."""
        key = (scope["method"], getattr(scope.get("route"), "path", "unknown"), status)
        series = self._series.get(key)
        if series is None:
            method = key[0] if key[0] in _METHODS else "other"
            series = self._requests.labels(method, key[1], str(status)), self._seconds.labels(method, key[1])
            if method != "other":
                self._series[key] = series
        series[0].inc()
        series[1].observe(seconds)

    def read(self, source: str) -> None:
        """A record was read from `memory`, `redis` or the `database`."""
        self._reads.labels(source).inc()

    def events(self, outcome: str, count: int = 1) -> None:
        """Events were `applied`, `duplicate`, `reused`, `invalid` or `accepted`."""
        self._events.labels(outcome).inc(count)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
