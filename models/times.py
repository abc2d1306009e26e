"""Times as operators write them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_time(text: str) -> datetime | None:
    """Return a time in RFC 3339, or an age such as 2h before now. None if the text is neither."""
    if age := re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", text, re.ASCII):
        try:
            return datetime.now(UTC) - timedelta(seconds=float(age[1]) * _UNITS_S[age[2]])
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return None if moment.utcoffset() is None else moment
