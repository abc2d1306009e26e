"""Webhooks: each committed change as a signed POST to the subscriptions that it matches (Standard Webhooks).

The modules that send are imported when a sink is made: only the runner needs them.
"""

import resource
from typing import TYPE_CHECKING

from evalstore.sinks.webhook_options import WebhookOptions
from evalstore.storage import database
from models.networks import parse_networks
from models.settings import Settings

if TYPE_CHECKING:
    from evalstore.sinks.webhook_sink import WebhookSink


def create(name: str, options: WebhookOptions, settings: Settings) -> "WebhookSink":
    """Return the sink, with connections of its own to the database."""
    from evalstore.sinks.webhook_sink import WebhookSink  # noqa: PLC0415 - see above

    _raise_file_limit(options.connections)
    engine = database.connect(settings, pool_size=2)
    return WebhookSink(name, options, engine, parse_networks(settings.webhook_allow or ""))


def _raise_file_limit(connections: int) -> None:
    """Each connection is an open file, and the default limit of many systems is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
