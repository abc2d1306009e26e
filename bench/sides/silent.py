"""evalstore's worker without confirmations, to measure their cost: no outbox and no relay."""

import worker.tasks
from evalstore.storage import event_store
from worker import confirmation_relay

vars(event_store)["_confirmations"] = lambda *_: list[event_store.Confirmation]()
vars(confirmation_relay)["relay"] = lambda *_: 0
broker = worker.tasks.broker
