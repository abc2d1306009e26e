"""Values of queries and forms that several pages read, and positions in lists."""

from datetime import datetime
from typing import Any
from uuid import UUID

from evalstore.api import cursors
from evalstore.api.problems import Problem, invalid
from evalstore.console.pages import View
from models import times
from models.errors import Fault


def time_of(view: View, name: str) -> datetime | None:
    """Return a time of the query: RFC 3339, or an age such as 2h. Raises Problem (422)."""
    text = view.query(name)
    found = times.parse_time(text) if text else None
    if text and found is None:
        raise invalid([Fault(name, "expected RFC 3339 like 2026-01-31T09:30:00Z, or an age like 2h, 7d")])
    return found


def uuid_of(view: View, name: str, what: str) -> UUID:
    """Return an id of the path. Raises Problem (404)."""
    try:
        return UUID(view.path(name))
    except ValueError:
        raise Problem(404, "not-found", f"there is no {what} {view.path(name)[:100]!r}") from None


def number_of(text: str, name: str, least: float, most: float) -> float | None:
    """Return a number of a form, None if it is empty. Raises Problem (422)."""
    if not text.strip():
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise invalid([Fault(name, f"expected a number from {least:,g} to {most:,g}")])
    return value


def whole_number_of(text: str, name: str, least: int = 1, most: int = 1_000_000_000) -> int | None:
    """Return an integer of a form, None if it is empty. Raises Problem (422)."""
    value = number_of(text, name, least, most)
    if value is not None and value != int(value):
        raise invalid([Fault(name, "expected a whole number")])
    return None if value is None else int(value)


def require_admin(view: View) -> None:
    """Raises Problem (403) unless the viewer has the scope admin, as the API asks for the same data."""
    if "admin" not in view.viewer.scopes:
        raise Problem(403, "forbidden", "this page needs a key with the scope admin")


def position_of(view: View, key: Any) -> Any:
    """Return the position that the parameter `cursor` names as a time and a key, or None. Raises Problem (422)."""
    cursor = view.query("cursor")
    return None if cursor is None else cursors.decode_time(cursor, key)
