"""Webhooks: each committed change as a signed POST to the subscriptions that it matches (Standard Webhooks).

The sink only persists deliveries, so that a receiver never delays its cursor. A thread beside it sends them.
"""

import resource
import ssl
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from pydantic import Field
from sqlalchemy import Engine

from evalstore.sinks.options import Options
from evalstore.sinks.protocol import Batch, SinkEvent
from evalstore.sinks.webhook_request import Requests, Resolve
from evalstore.sinks.webhook_sender import Limits, Sender
from evalstore.storage import database, webhook_deliveries
from evalstore.storage.webhook_deliveries import Confirmation, Retries
from models import webhooks
from models.networks import Network, parse_networks
from models.settings import settings


class WebhookOptions(Options):
    """The keys of a table with `type = "webhook"`."""

    batch_events: int = Field(default=200, ge=1, le=1000)
    concurrency: int = Field(default=8, ge=1, le=100)
    connections: int = Field(default=1000, ge=1, le=10_000)
    request_timeout_s: float = Field(default=15, ge=0.1, le=60)
    first_retry_s: float = Field(default=5, ge=0.01, le=3600)
    history_days: float = Field(default=7, ge=4, le=90)
    ca_file: Path | None = None


class WebhookSink:
    """See `Sink`. Begins to send what is pending when it is made."""

    def __init__(
        self,
        name: str,
        options: WebhookOptions,
        engine: Engine,
        networks: Sequence[Network],
        clock: Callable[[], datetime] = webhooks.now,
        resolve: Resolve | None = None,
    ) -> None:
        self._engine, self._clock = engine, clock
        tls = ssl.create_default_context()
        if options.ca_file:
            tls.load_verify_locations(options.ca_file)
        self._sender = Sender(
            name,
            engine,
            lambda resolve: Requests(resolve, networks, tls, options.request_timeout_s),
            Retries(first_s=options.first_retry_s),
            Limits(options.concurrency, options.connections, options.history_days * 86_400),
            clock,
            resolve,
        )
        self._sender.start()

    def write(self, batch: Batch) -> None:
        """Raises DatabaseOutage."""
        with self._engine.connect() as conn:
            webhook_deliveries.persist(conn, _confirmations(batch), self._clock())
        self._sender.wake()

    def erase(self, eval_id: str) -> None:
        """Forget the deliveries of an evaluation, and send that it is erased. Raises DatabaseOutage."""
        with self._engine.connect() as conn:
            webhook_deliveries.erase(conn, eval_id, self._clock())
        self._sender.wake()

    def close(self) -> None:
        """Stop sending."""
        self._sender.close()
        self._engine.dispose()


def create(name: str, options: WebhookOptions) -> WebhookSink:
    """Return the sink, with connections of its own to the database."""
    _raise_file_limit(options.connections)
    given = settings()
    engine = database.connect(given, pool_size=2)
    return WebhookSink(name, options, engine, parse_networks(given.webhook_allow or ""))


def _raise_file_limit(connections: int) -> None:
    """Each connection is an open file, and the default limit of many systems is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _confirmations(batch: Sequence[SinkEvent]) -> list[Confirmation]:
    """One of each evaluation and commit: the log gives all events of a commit one time."""
    commits: dict[tuple[str, str], list[SinkEvent]] = {}
    for event in batch:
        commits.setdefault((event.eval_id, str(event.fields["recorded_at"])), []).append(event)
    return [
        Confirmation(
            eval_id,
            events[-1].fields["version"],
            events[-1].status,
            tuple(event.event_id for event in events),
            tuple(dict.fromkeys(event.type for event in events)),
            recorded_at,
        )
        for (eval_id, recorded_at), events in commits.items()
    ]
