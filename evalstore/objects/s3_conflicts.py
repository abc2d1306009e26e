"""Repeat requests that S3 refuses because of another request for the same key."""

import random
import time
from collections.abc import Callable

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from evalstore.objects import s3_answers

CONFLICT_ATTEMPTS = 6
_CONFLICT_WAIT_S = 0.1


def wait_after_conflict(attempt: int) -> None:
    """Wait for a random time that doubles with each attempt, so that the same processes do not collide again."""
    time.sleep(_CONFLICT_WAIT_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311


def call_with_retries(call: Callable[[], object]) -> None:
    """Call, and repeat after conflicts over the key. Raises ClientError."""
    for attempt in range(CONFLICT_ATTEMPTS):
        try:
            call()
        except ClientError as error:
            if not s3_answers.is_conflict(error) or attempt + 1 == CONFLICT_ATTEMPTS:
                raise
            wait_after_conflict(attempt)
        else:
            return
