"""Start-up of a worker: `dramatiq worker.tasks` and `periodiq worker.tasks` import this."""

from models.extras import require

require("worker")

import dramatiq
from dramatiq.middleware import Retries

from evalstore import hooks, startup
from evalstore.telemetry import log_setup
from models.unknown_settings import warn_unknown_env
from tasks.actor import store_evaluation
from worker import metrics_endpoint, schedule
from worker.background import Background, BackgroundMiddleware
from worker.broker import Broker
from worker.handler import Handler
from worker.verified_database import VerifiedDatabase

settings = startup.load_or_exit()
log_setup.replace_formatters()
warn_unknown_env()
broker = Broker(
    url=settings.redis_url.get_secret_value(),
    namespace=settings.redis_namespace,
    # Only for the periodic jobs. The handler retries events.
    middleware=[Retries(max_retries=20, min_backoff=1_000, max_backoff=60_000)],
    max_deaths=settings.max_deaths,
    batch_events=settings.batch_events,
    batch_bytes=settings.batch_bytes,
)
dramatiq.set_broker(broker)
connections = VerifiedDatabase.of(settings)
called = hooks.load_or_exit(settings, broker.metrics.counters)
store = Handler(connections, settings, broker.in_flight, broker.metrics, called)
broker.add_middleware(BackgroundMiddleware(store, lambda: Background(connections, broker, broker.lua, broker.metrics)))
broker.declare_batch_actor(store_evaluation, store)
broker.add_middleware(metrics_endpoint.MetricsMiddleware(settings))
schedule.declare(broker, connections, settings, on_tick=metrics_endpoint.Scheduler(settings).tick)
