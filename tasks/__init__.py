"""The sending side of evalstore, for a gateway. Importing it loads neither SQLAlchemy, psycopg nor boto3.

from tasks import store_evaluation

store_evaluation.send({"type": "evaluation:queued", "eval_id": "run-1", "code": "print(1)"})
"""

from tasks.actor import store_evaluation, store_evaluations
from tasks.recording import recording

__all__ = ["recording", "store_evaluation", "store_evaluations"]
