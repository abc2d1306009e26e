"""The HTTP endpoint of a group of processes: metrics in Prometheus's text format, and health."""

import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from evalstore.telemetry import process_registry
from evalstore.telemetry.backend_stats import BackendStats
from evalstore.telemetry.counters import Counters, Schema, Series
from evalstore.telemetry.disks import Disks
from evalstore.telemetry.process_registry import Group
from models.addresses import authority
from models.logs import EventLogger
from models.metrics import METRICS, Metric
from models.settings import Settings
from tasks.spool import Spool, folder_of
from tasks.tracing import release

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
# These metrics have many possible series, so only counted series are shown.
_SPARSE: Final = frozenset({"evalstore_http_requests_total", "evalstore_http_request_duration_seconds"})

_AGAIN_S: Final = 5.0

log = EventLogger("evalstore")


class Exposition(Collector):
    """Collects the metrics of a group. `always` lists series of sparse metrics to show at 0."""

    def __init__(
        self,
        role: str,
        layout: Schema,
        totals: Callable[[], Sequence[float]],
        group: Group | None,
        settings: Settings,
        standing: BackendStats | None = None,
        always: frozenset[Series] = frozenset(),
    ) -> None:
        self._role, self._layout, self._totals, self._group = role, layout, totals, group
        self._standing, self._always = standing, always
        self._settings, self._disks = settings, Disks(settings)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics and their media type, in the format of an Accept header."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def describe(self) -> list[Family]:
        return []

    def collect(self) -> Iterator[Family]:
        """Yield the families in the order of the list."""
        totals, seen = self._totals(), self._seen()
        for metric in METRICS:
            if metric.name in self._layout.metrics:
                yield self._counted(metric, totals)
            elif metric.source in {"any", "servers"}:
                family = _family(metric)
                for labels, value in seen.get(metric.name, {}).items():
                    family.add_metric(labels, value)  # type: ignore[call-arg,arg-type]
                if family.samples:
                    yield family

    def _counted(self, metric: Metric, totals: Sequence[float]) -> Family:
        family, width = _family(metric), len(metric.buckets)
        for (name, labels), place in self._layout.series(metric.name):
            shown = metric.name not in _SPARSE or (name, labels) in self._always
            if isinstance(family, HistogramMetricFamily):
                counts, sum_ = totals[place : place + width + 1], totals[place + width + 1]
                if shown or any(counts):
                    family.add_metric(labels, _cumulative(metric.buckets, counts), sum_)
            elif shown or totals[place]:
                family.add_metric(labels, totals[place])
        return family

    def _seen(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return the values read now, by metric and labels."""
        found: dict[Series, float] = dict(self._standing.numbers()) if self._standing else {}
        found["evalstore_build_info", (release(), platform.python_version())] = 1
        processes = list(self._group.processes()) if self._group else []
        stuck = sum(bool(process.stuck) for process in processes)
        found["evalstore_processes", (self._role, "live")] = len(processes) - stuck
        found["evalstore_processes", (self._role, "stuck")] = stuck
        pids = [process.pid for process in processes] or [os.getpid()]
        found["evalstore_process_resident_memory_bytes", ()] = sum(map(_resident_bytes, pids))
        found |= _spool(self._settings) | self._disks.numbers()
        by_name: dict[str, dict[tuple[str, ...], float]] = {}
        for (name, labels), value in found.items():
            by_name.setdefault(name, {})[labels] = float(value)
        return by_name


def _family(metric: Metric) -> Family:
    kind = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}[metric.kind]
    family: Family = kind(metric.name, metric.help, labels=list(metric.labels))
    return family


def _cumulative(buckets: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    total, found = 0.0, []
    for most, count in zip([*map(str, buckets), "+Inf"], counts, strict=True):
        total += count
        found.append((most, total))
    return found


def _resident_bytes(pid: int) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _spool(settings: Settings) -> dict[Series, float]:
    folder = folder_of(settings)
    if folder is None:
        return {}
    try:
        size, age_s = Spool(folder, max_bytes=settings.spool_max_bytes).waiting()
    except OSError:  # The file may belong to another user: show all other metrics.
        return {}
    return {("evalstore_spool_bytes", ()): size, ("evalstore_spool_oldest_age_seconds", ()): age_s}


class Answer(NamedTuple):
    """A response to a health probe."""

    status: int
    told: dict[str, object]


def live(group: Group | None) -> Answer:
    """Check that the group has processes and that all their loops make progress. Asks no server."""
    processes = list(group.processes()) if group else []
    stuck = {str(process.pid): process.stuck for process in processes if process.stuck}
    if processes and not stuck:
        return Answer(200, {"status": "alive", "processes": len(processes)})
    return Answer(503, {"status": "stuck" if stuck else "nothing runs", "stuck": stuck})


def ready(standing: BackendStats) -> Answer:
    """Check that Redis and PostgreSQL answer, and that the schema fits this release."""
    found = standing.ready()
    return Answer(503, {"status": "not ready", **found}) if found else Answer(200, {"status": "ready"})


class _Server(ThreadingHTTPServer):
    """Serves each request in its own thread, over IPv4 or IPv6; on `::` over both. Raises OSError."""

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name may have both kinds of addresses. Most scrapers of localhost use 127.0.0.1, so prefer IPv4.
        self.address_family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        super().__init__(address, handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)  # HTTPServer would also resolve the host name, which may take seconds


class Endpoint:
    """Serves `/metrics`, `/health/live` and `/health/ready`."""

    def __init__(
        self,
        role: str,
        group: Group,
        layout: Schema,
        settings: Settings,
        port: int,
        is_ready: Callable[[], Answer] | None = None,
    ) -> None:
        standing = None if is_ready else BackendStats(settings)
        text = Exposition(role, layout, lambda: group.totals(layout), group, settings, standing).text
        answers: dict[str, Callable[[], Answer]] = {
            "/health/live": lambda: live(group),
            "/health/ready": is_ready or (lambda: ready(standing or BackendStats(settings))),
        }

        class Handler(BaseHTTPRequestHandler):
            timeout = 10
            server_version, sys_version = "evalstore", ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, *text(self.headers.get("Accept", "")))
                elif path in answers:
                    status, told = answers[path]()
                    self._answer(status, json.dumps(told).encode() + b"\n", "application/json")
                else:
                    self._answer(404, b"/metrics, /health/live, /health/ready\n", "text/plain")

            def _answer(self, status: int, body: bytes, media_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *given: object) -> None:
                """Log nothing: a scrape comes every few seconds."""

        self.server = _Server(settings.metrics_host, port, Handler)


def start(
    role: str, group: Group, layout: Schema, settings: Settings, port: int, is_ready: Callable[[], Answer] | None = None
) -> None:
    """Serve from a thread. If it cannot listen, warn once and retry: a process of the last release may still use the port.

    `is_ready` answers `/health/ready` of a process that does not need both Redis and PostgreSQL.
    """

    def serve() -> None:
        warned = False
        while True:
            try:
                server = Endpoint(role, group, layout, settings, port, is_ready).server
            except OSError as error:
                if not warned:
                    log.warning("metrics_not_served", address=authority(settings.metrics_host, port), error=error.strerror)
                warned = True
                time.sleep(_AGAIN_S)
            else:
                server.serve_forever()

    threading.Thread(target=serve, name="evalstore-metrics", daemon=True).start()


def publish(
    role: process_registry.Role,
    counters: Counters,
    settings: Settings,
    port: int | None,
    log: EventLogger,
    is_ready: Callable[[], Answer] | None = None,
) -> None:
    """Let this process join its group, and serve the group's metrics if there is a port.

    Where EVALSTORE_RUNTIME_DIR cannot be used, warn by `log` and go on without both.
    """
    try:
        group = process_registry.join(role, counters, settings.runtime_dir)
    except process_registry.RegistryUnavailable as error:
        log.warning("runtime_dir_unusable", error=error)
    else:
        if port:
            start(role, group, counters.schema, settings, port, is_ready)
