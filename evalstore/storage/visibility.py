"""The evaluations that a key may see: those of one submitter, those of runs with a prefix, or both.

The current record of an evaluation decides. A record without a submitter, or without a run, matches no restriction on it.
"""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection

from evalstore.storage import database
from models.errors import EvalstoreError


@dataclass(frozen=True)
class Visibility:
    """Restrictions that combine by AND. Without any, everything is visible."""

    submitter: str | None = None
    run_prefix: str | None = None

    @property
    def is_restricted(self) -> bool:
        """Tell whether some evaluations are hidden."""
        return self.submitter is not None or self.run_prefix is not None

    def allows(self, submitter: str | None, run_id: str | None) -> bool:
        """Tell whether an evaluation with this submitter and run is visible."""
        if self.submitter is not None and submitter != self.submitter:
            return False
        return self.run_prefix is None or (run_id is not None and run_id.startswith(self.run_prefix))

    def conditions(self, alias: str = "") -> tuple[list[str], list[Any]]:
        """Return SQL conditions on columns `submitter` and `run_id` of the table `alias`, and their parameters.

        There are none if everything is visible.
        """
        prefix = f"{alias}." if alias else ""
        found: list[tuple[str, str]] = []
        if self.submitter is not None:
            found.append((f"{prefix}submitter = %s", self.submitter))
        if self.run_prefix is not None:
            found.append((f"starts_with({prefix}run_id, %s)", self.run_prefix))
        return [condition for condition, _ in found], [value for _, value in found]


EVERYTHING: Final = Visibility()


class Hidden(EvalstoreError):
    """The caller may not write these evaluations; nothing is stored. To the caller they do not exist.

    `foreign`: those among them that the caller could write, but for queued events with another submitter or run.
    """

    def __init__(self, eval_ids: frozenset[str], foreign: frozenset[str] = frozenset()) -> None:
        self.eval_ids, self.foreign = eval_ids, foreign
        super().__init__("the key may not write these evaluations")


_OWNERS: Final = "SELECT eval_id, submitter, run_id FROM evaluations WHERE eval_id = ANY(%s::text[])"


def visible(conn: Connection, eval_ids: list[str], visibility: Visibility) -> set[str]:
    """Return those of these evaluations that exist and are visible. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        rows = cursor.execute(_OWNERS, [eval_ids]).fetchall()
    return {eval_id for eval_id, submitter, run_id in rows if visibility.allows(submitter, run_id)}
