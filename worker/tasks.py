"""Start-up of a worker: `dramatiq worker.tasks` and `periodiq worker.tasks` import this."""

import dramatiq
from dramatiq.middleware import Retries

from models.settings import settings
from tasks import environment, logs
from tasks.evaluations import store_evaluation
from worker import exposition, schedule
from worker.background import Beside
from worker.breaker import BreakerLimits
from worker.broker import Broker
from worker.evaluations import Store

environment.settings_or_end()
logs.take_over()
environment.tell_misspelt()
broker = Broker(
    url=settings().redis_url.get_secret_value(),
    namespace=settings().redis_namespace,
    # For the periodic jobs; events are not retried one by one.
    middleware=[Retries(max_retries=20, min_backoff=1_000, max_backoff=60_000)],
    max_deaths=settings().max_deaths,
    batch_events=settings().batch_events,
    batch_bytes=settings().batch_bytes,
)
dramatiq.set_broker(broker)
store = Store(
    broker.hold,
    BreakerLimits(
        settings().breaker_messages, settings().breaker_share, settings().breaker_window_s, settings().breaker_probe_s
    ),
    broker.metrics,
)
broker.add_middleware(Beside(store))
broker.declare_batch_actor(store_evaluation, store)
broker.add_middleware(exposition.Shared())
schedule.declare(broker, on_tick=exposition.Scheduler().tick)
