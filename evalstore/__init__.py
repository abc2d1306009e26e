"""The public names of evalstore. Each is imported when it is first used, so that a sender loads no server-side library.

from evalstore import store_evaluation

store_evaluation.send({"type": "evaluation:queued", "eval_id": "run-1", "code": "print(1)"})
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalstore.client import StorageClient
    from tasks import recording, store_evaluation, store_evaluations
    from tasks.confirmations import Confirmations

_MODULES = {
    "Confirmations": "tasks.confirmations",
    "StorageClient": "evalstore.client",
    "recording": "tasks",
    "store_evaluation": "tasks",
    "store_evaluations": "tasks",
}
__all__ = ["Confirmations", "StorageClient", "recording", "store_evaluation", "store_evaluations"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'evalstore' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
