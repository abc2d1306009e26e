"""Start-up of a worker: `dramatiq worker.tasks` and `periodiq worker.tasks` import this."""

import logging

import dramatiq

from tasks.broker import broker as evalstore_broker
from tasks.evaluations import store_evaluation
from worker import evaluations, schedule

broker = evalstore_broker()
dramatiq.set_broker(broker)
store_evaluation.fn = evaluations.store
schedule.declare(broker)
logging.getLogger("alembic").setLevel(logging.WARNING)
