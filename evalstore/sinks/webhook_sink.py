"""The sink of webhooks. It persists deliveries, so that a receiver never delays its cursor; a thread beside it sends them."""

import ssl
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Engine

from evalstore.sinks.protocol import Batch, SinkEvent
from evalstore.sinks.webhook_options import WebhookOptions
from evalstore.sinks.webhook_request import Requests, Resolve
from evalstore.sinks.webhook_sender import Limits, Sender
from evalstore.storage import webhook_deliveries
from evalstore.storage.webhook_deliveries import Confirmation, Retries
from models import webhooks
from models.networks import Network


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

    def confirm(self, confirmation: dict[str, Any]) -> None:
        """Raises DatabaseOutage."""
        with self._engine.connect() as conn:
            webhook_deliveries.notify(conn, confirmation, self._clock())
        self._sender.wake()

    def close(self) -> None:
        """Stop sending."""
        self._sender.close()
        self._engine.dispose()


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
