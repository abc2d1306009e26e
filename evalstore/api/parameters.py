"""Types of query parameters."""

import contextlib
import re
from datetime import datetime
from typing import Annotated, Literal, cast

from pydantic import AwareDatetime, ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def _parse_time(value: object, parse: ValidatorFunctionWrapHandler) -> datetime:
    with contextlib.suppress(ValidationError):
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[Tt ]", value, re.ASCII):  # pydantic parses numbers too
            return cast("datetime", parse(value))
    raise ValueError("expected RFC 3339 with an offset, like 2026-01-31T09:30:00Z")


Status = Literal["queued", "running", "completed", "failed", "timed_out", "cancelled", "lost"]
Time = Annotated[AwareDatetime, WrapValidator(_parse_time)]
