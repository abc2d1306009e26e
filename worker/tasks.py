"""Start-up of a worker: `dramatiq worker.tasks` and `periodiq worker.tasks` import this."""

import dramatiq
from dramatiq.middleware import Retries

from evalstore import startup
from evalstore.telemetry import log_setup
from models.settings import settings, warn_unknown_env
from tasks.actor import store_evaluation
from worker import metrics_endpoint, schedule
from worker.background import BackgroundMiddleware
from worker.breaker import BreakerLimits
from worker.broker import Broker
from worker.handler import Handler

startup.load_or_exit()
log_setup.replace_formatters()
warn_unknown_env()
broker = Broker(
    url=settings().redis_url.get_secret_value(),
    # For the periodic jobs; events are not retried one by one.
    middleware=[Retries(max_retries=20, min_backoff=1_000, max_backoff=60_000)],
    max_deaths=settings().max_deaths,
    batch_events=settings().batch_events,
    batch_bytes=settings().batch_bytes,
)
dramatiq.set_broker(broker)
store = Handler(
    broker.in_flight,
    BreakerLimits(
        settings().breaker_messages, settings().breaker_share, settings().breaker_window_s, settings().breaker_probe_s
    ),
    broker.metrics,
)
broker.add_middleware(BackgroundMiddleware(store))
broker.declare_batch_actor(store_evaluation, store)
broker.add_middleware(metrics_endpoint.MetricsMiddleware())
schedule.declare(broker, on_tick=metrics_endpoint.Scheduler().tick)
