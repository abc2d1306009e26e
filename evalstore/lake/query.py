"""Questions to the lake in SQL, by DuckDB: read-only, without access to files, bounded in memory, time and rows.

DuckDB reads through Arrow, so it needs no access of its own to the warehouse, and no credentials.
"""

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple

from evalstore.lake.catalog import errors
from evalstore.lake.schema import TABLES, LakeTable, arrow_schema
from evalstore.lake.tables import LakeTables
from models import content
from models.errors import EvalstoreError, InvalidSettings
from models.extras import how_to_install, is_installed

_CHUNK: Final = 1000


class QueryRefused(EvalstoreError):
    """The query is no single SELECT, is wrong, or exceeds a limit, which the message names."""


class Limits(NamedTuple):
    """What a query may use."""

    rows: int = 10_000
    seconds: float = 60
    memory_mb: int = 512


def run(lake: LakeTables, sql: str, limits: Limits) -> list[dict[str, Any]]:
    """Return the rows of a SELECT from `events` and `evaluations`, with values that JSON has.

    Raises QueryRefused, LakeOutage, InvalidSettings without the extra `lake-query`.
    """
    if not is_installed("lake-query"):
        raise InvalidSettings(how_to_install("lake-query"))
    import duckdb  # noqa: PLC0415 - only this command needs it

    with duckdb.connect(":memory:") as conn:
        _load_extension(conn)
        for table in TABLES:
            conn.register(table.name, _dataset(lake, table))
        for setting in (
            "SET python_enable_replacements = false",
            "SET temp_directory = ''",
            "SET autoinstall_known_extensions = false",
            "SET TimeZone = 'UTC'",
            f"SET memory_limit = '{limits.memory_mb}MB'",
            "SET enable_external_access = false",
            "SET lock_configuration = true",
        ):
            conn.execute(setting)
        with errors(), _bounded(conn, limits):
            _refuse_others(conn, sql)
            return _rows(conn.execute(sql), limits)


def _load_extension(conn: Any) -> None:
    """Load functions for times with a zone, from the wheel of the extension."""
    import duckdb_extension_icu  # noqa: PLC0415 - as above

    (folder,) = duckdb_extension_icu.__path__
    conn.load_extension(str(next(Path(folder).rglob("icu.duckdb_extension"))))


def _dataset(lake: LakeTables, table: LakeTable) -> Any:
    """Return the current snapshot; the bounds of each file let DuckDB skip files."""
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.dataset as ds  # noqa: PLC0415

    found = lake.load(table)
    present = lake.files[table].of_snapshot(found)
    if not present:
        return pa.table([pa.array([], field.type) for field in arrow_schema(table)], schema=arrow_schema(table))
    io = found.io
    scheme, netloc, _ = io.parse_location(present[0].path)
    time, eval_id = ds.field(table.time), ds.field("eval_id")
    bounds = []
    for file in present:
        bound = (time >= pa.scalar(file.times.first)) & (time <= pa.scalar(file.times.last)) & (eval_id >= file.low)
        bounds.append(bound & (eval_id <= file.high) if file.high is not None else bound)
    return ds.FileSystemDataset.from_paths(
        [io.parse_location(file.path)[2] for file in present],
        schema=arrow_schema(table),
        format=ds.ParquetFileFormat(),
        filesystem=io.fs_by_scheme(scheme, netloc),
        partitions=bounds,
    )


def _refuse_others(conn: Any, sql: str) -> None:
    import duckdb  # noqa: PLC0415 - as above

    statements = conn.extract_statements(sql)
    if len(statements) != 1 or statements[0].type not in {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}:
        raise QueryRefused("the query is read-only: expected one SELECT")


@contextmanager
def _bounded(conn: Any, limits: Limits) -> Iterator[None]:
    """Interrupt the query after its time, and translate DuckDB's errors."""
    import duckdb  # noqa: PLC0415 - as above

    timer = threading.Timer(limits.seconds, conn.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException:
        raise QueryRefused(f"the query took longer than {limits.seconds:g} s: raise the limit with --timeout") from None
    except duckdb.OutOfMemoryException:
        raise QueryRefused(f"the query needs more than {limits.memory_mb} MB: raise the limit with --memory") from None
    except duckdb.PermissionException as error:
        raise QueryRefused(f"the query has no access to files: {error}") from None
    except duckdb.Error as error:
        raise QueryRefused(f"{type(error).__name__}: {error}") from None
    finally:
        timer.cancel()


def _rows(result: Any, limits: Limits) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for batch in result.to_arrow_reader(_CHUNK):  # as Python objects, times would need the package pytz
        rows += [{name: _plain(value) for name, value in row.items()} for row in batch.to_pylist()]
        if len(rows) > limits.rows:
            raise QueryRefused(
                f"the query gives more than {limits.rows:,} rows: add a LIMIT, or raise the limit with --max-rows"
            )
    return rows


def _plain(value: Any) -> Any:
    """Return a value that JSON has; bytes as text if they are text, else as base64."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        found = content.from_bytes(bytes(value))
        return found if isinstance(found, str) else base64.b64encode(found).decode()
    if isinstance(value, (datetime, date)):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
