"""Types of query parameters, and checks of their names."""

import contextlib
import re
from collections.abc import Collection
from datetime import datetime
from typing import Annotated, Literal, cast

from fastapi import Request
from pydantic import AwareDatetime, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from evalstore.api.problems import invalid
from models.errors import Fault


def _parse_time(value: object, parse: ValidatorFunctionWrapHandler) -> datetime:
    with contextlib.suppress(ValidationError):
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[Tt ]", value, re.ASCII):  # pydantic parses numbers too
            return cast("datetime", parse(value))
    raise ValueError("expected RFC 3339 with an offset, like 2026-01-31T09:30:00Z")


Status = Literal["queued", "running", "completed", "failed", "timed_out", "cancelled", "lost"]
Time = Annotated[AwareDatetime, WrapValidator(_parse_time)]


def refuse_unknown(request: Request, known: Collection[str]) -> None:
    """Raise Problem (422) for parameters of the query that are unknown or given twice, so that a typo shows."""
    names = [name for name, _ in request.query_params.multi_items()]
    faults = [Fault(name[:100], "unknown parameter: /docs lists them") for name in dict.fromkeys(names) if name not in known]
    faults += [Fault(name, "given twice") for name in known if names.count(name) > 1]
    if faults:
        raise invalid(faults)
