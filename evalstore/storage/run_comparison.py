"""Compare two runs: the evaluations whose outcome differs, matched by a key that both runs have."""

from typing import Any, Final, NamedTuple

from psycopg.rows import dict_row
from sqlalchemy import Connection

from evalstore.storage import database
from evalstore.storage.visibility import EVERYTHING, Visibility

# Of each run so many evaluations are compared, the oldest first.
COMPARED: Final = 20_000
_OUTCOME: Final = (
    "CASE WHEN status = 'completed' THEN CASE WHEN exit_code = 0 THEN 'passed' ELSE 'exit code' END ELSE status END"
)
_REST_OF_ID: Final = """CASE WHEN starts_with(eval_id, run_id) THEN substr(eval_id, length(run_id) + 1)
    WHEN right(eval_id, length(run_id)) = run_id THEN left(eval_id, -length(run_id)) ELSE eval_id END"""
_SIDE: Final = """
SELECT DISTINCT ON (key) key, eval_id, status, outcome, score, duration_ms FROM (
    SELECT {key} AS key, eval_id, status, {outcome} AS outcome, score, duration_ms, created_at
    FROM evaluations WHERE run_id = %({side}_run)s{visible} ORDER BY created_at LIMIT {most}
) one WHERE key IS NOT NULL ORDER BY key, created_at DESC
"""
_JOINED: Final = """
WITH a AS MATERIALIZED ({a}), b AS MATERIALIZED ({b}), joined AS MATERIALIZED (
    SELECT key, a.eval_id AS a_eval_id, a.outcome AS a_outcome, a.score AS a_score, a.duration_ms AS a_duration_ms,
        b.eval_id AS b_eval_id, b.outcome AS b_outcome, b.score AS b_score, b.duration_ms AS b_duration_ms
    FROM a FULL JOIN b USING (key)
)
"""
_COUNT: Final = """
SELECT coalesce(a_outcome, 'missing') AS a, coalesce(b_outcome, 'missing') AS b, count(*)
FROM joined GROUP BY 1, 2 ORDER BY 3 DESC
"""
_CHANGED: Final = """
SELECT * FROM joined WHERE a_outcome IS DISTINCT FROM b_outcome AND key > %(after)s ORDER BY key LIMIT %(limit)s
"""


class Comparison(NamedTuple):
    """How outcomes moved: rows of `a`, `b` and `count`; and a page of evaluations that changed, with the key to go on after."""

    moves: list[dict[str, Any]]
    changed: list[dict[str, Any]]
    following: str | None


def compare(
    conn: Connection,
    runs: tuple[str, str],
    *,
    by: str | None = None,
    limit: int,
    after: str = "",
    visibility: Visibility = EVERYTHING,
) -> Comparison:
    """Compare two runs. `by`: a key of the metadata; without it, `eval_id` without the run's id at its beginning or end.

    An outcome is `passed` (exit code 0), `exit code`, or the status. Raises DatabaseOutage (retry).
    """
    values: dict[str, Any] = {"a_run": runs[0], "b_run": runs[1], "by": by, "after": after, "limit": limit + 1}
    key = _REST_OF_ID if by is None else "metadata ->> %(by)s"
    visible = ""
    for at, (condition, value) in enumerate(zip(*visibility.conditions(), strict=True)):
        visible += f" AND {condition.replace('%s', f'%(visible_{at})s')}"
        values[f"visible_{at}"] = value
    sides = {side: _SIDE.format(key=key, outcome=_OUTCOME, side=side, visible=visible, most=COMPARED) for side in ("a", "b")}
    joined = _JOINED.format(**sides)
    with database.errors(), conn.begin(), database.driver(conn).cursor(row_factory=dict_row) as cursor:
        moves = cursor.execute((joined + _COUNT).encode(), values).fetchall()
        changed = cursor.execute((joined + _CHANGED).encode(), values).fetchall()
    following = changed[limit - 1]["key"] if len(changed) > limit else None
    return Comparison(moves, changed[:limit], following)


_SCORES: Final = """
SELECT score FROM evaluations WHERE run_id = %s AND score IS NOT NULL ORDER BY created_at DESC LIMIT %s
"""


def scores(conn: Connection, run_id: str, limit: int) -> list[float]:
    """Return the scores of the newest evaluations of a run. Raises DatabaseOutage (retry)."""
    with database.errors(), conn.begin(), database.driver(conn).cursor(binary=True) as cursor:
        return [float(score) for (score,) in cursor.execute(_SCORES.encode(), [run_id, limit])]
