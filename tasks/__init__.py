"""What can be asked of a worker, and all that a gateway imports: neither SQLAlchemy, psycopg nor boto3 is loaded.

from tasks import store_evaluation

store_evaluation.send({"type": "evaluation:queued", "eval_id": "run-1", "code": "print(1)"})
"""

from tasks.actor import store_evaluation, store_evaluations

__all__ = ["store_evaluation", "store_evaluations"]
