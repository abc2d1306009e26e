"""The types of confirmations: notices of committed changes. No I/O."""

from typing import Final

CREATED: Final = "storage:evaluation:created"
UPDATED: Final = "storage:evaluation:updated"
ERASED: Final = "storage:evaluation:erased"
REPAIRED: Final = "storage:evaluation:repaired"
RUN_FINISHED: Final = "storage:run:finished"
RUN_UPDATED: Final = "storage:run:updated"
ANOMALY_DETECTED: Final = "storage:anomaly:detected"

# In the order in which documents name them.
CONFIRMATIONS: Final = (CREATED, UPDATED, ERASED, REPAIRED, RUN_FINISHED, RUN_UPDATED, ANOMALY_DETECTED)
