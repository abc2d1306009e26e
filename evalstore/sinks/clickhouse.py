"""ClickHouse: each event a row, over the HTTP interface.

A batch is one INSERT with an `insert_deduplication_token`. It comes again with the same token, so the server drops the second
one. The table is a ReplacingMergeTree by `eval_id` and `event_id`: rows that come again after a rewind are merged away, and
`FINAL` shows each once. urllib3 is imported when a sink is made: only the runner needs it.
"""

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import msgspec

from evalstore.sinks.clickhouse_options import ClickHouseOptions
from evalstore.sinks.clickhouse_table import create_table, missing_columns, wrong_types
from evalstore.sinks.event_row import row
from evalstore.sinks.protocol import Batch
from models.errors import BadMessage, Outage
from models.settings import Settings

if TYPE_CHECKING:
    from urllib3 import HTTPHeaderDict, PoolManager

_CONNECT_S: Final = 10.0
_READ_S: Final = 90.0
# A value does not fit its column, or a constraint of the table: the same row fails the same way.
_BAD_ROW: Final = {
    *(6, 25, 26, 27, 32, 33, 38, 41, 53, 69, 70, 72, 117, 130, 131, 321, 349, 376, 407, 441, 467, 469, 675, 676),
}
_WHAT_TO_DO: Final = {
    16: "change the table as the column list in the documentation says, or set create = true",
    60: "create it, or set create = true",
    81: "create the database",
    164: "the user's profile is read-only: give it another one",
    193: "correct user and password",
    194: "correct user and password",
    241: "lower batch_events or batch_bytes, or give the server more memory",
    243: "free disk space on the server",
    252: "the server merges more slowly than it gets parts: raise batch_s",
    497: "GRANT SELECT, INSERT, ALTER DELETE on the table to the user; for create = true also CREATE TABLE, ALTER ADD COLUMN",
    516: "correct user and password",
}
# Each insert is one block, which is checked strictly and is in the table when the server answers.
_INSERT: Final = {
    "async_insert": "0",
    "date_time_input_format": "best_effort",
    "input_format_allow_errors_num": "0",
    "input_format_allow_errors_ratio": "0",
    "input_format_json_read_objects_as_strings": "1",
    "input_format_null_as_default": "1",
    "input_format_parallel_parsing": "0",
    "input_format_skip_unknown_fields": "0",
    "insert_deduplicate": "1",
    "max_insert_block_size": "1048576",
    "max_partitions_per_insert_block": "0",
    "min_insert_block_size_bytes": "0",
    "wait_end_of_query": "1",
}


class ClickHouseSink:
    """See `Sink` and `RepeatsBatches`."""

    def __init__(self, options: ClickHouseOptions) -> None:
        self._options = options
        self._table = f"`{options.database}`.`{options.table}`"
        self._pool = _pool(options)
        password = options.password()
        self._headers = {"X-ClickHouse-User": options.user, "Content-Type": "application/octet-stream"}
        if password is not None:
            self._headers["X-ClickHouse-Key"] = password.get_secret_value()

    def resume(self, _state: dict[str, Any] | None) -> dict[str, Any]:
        """Create the table where that is asked for, and check its columns. Raises Outage."""
        if self._options.create:
            self._ask(create_table(self._table))
        columns = self._columns()
        missing = missing_columns(self._table, columns)
        if missing and self._options.create:
            self._ask(missing)
            columns = self._columns()
            missing = missing_columns(self._table, columns)
        if missing:
            raise Outage(f"the table lacks columns: {missing}, or set create = true")
        if wrong := wrong_types(columns):
            raise Outage(f"the table {self._table} has columns of other types: {wrong}. Change the table, or name another one")
        return {}

    def write(self, batch: Batch) -> None:
        """Raises Outage, BadMessage."""
        lines = []
        for event in batch:
            values = row(event)
            lines.append(event.json if values is event.fields else msgspec.json.encode(values))
        settings = {**_INSERT, "insert_deduplication_token": batch.key}
        try:
            self._ask(f"INSERT INTO {self._table} FORMAT JSONEachRow", b"\n".join(lines), settings)
        except BadMessage:
            self.resume(None)  # a table that was changed is no fault of the event
            raise

    def erase(self, eval_id: str) -> None:
        """Delete the rows: no query sees them from now on, and the next merge removes them from the disk. Raises Outage."""
        settings = {"param_eval_id": eval_id, "lightweight_deletes_sync": "1"}
        self._ask(f"DELETE FROM {self._table} WHERE eval_id = {{eval_id:String}}", b"", settings)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def _columns(self) -> dict[str, str]:
        """The columns of the table and their types, in any order."""
        names = self._ask(f"DESCRIBE TABLE {self._table} FORMAT JSONEachRow", b"", {"describe_compact_output": "1"})
        return {found["name"]: found["type"] for found in map(msgspec.json.decode, names.splitlines())}

    def _ask(self, query: str, body: bytes = b"", settings: dict[str, str] | None = None) -> bytes:
        """Run a query. Raises BadMessage where a row does not fit, and Outage for all else."""
        from urllib3 import Timeout  # noqa: PLC0415 - see above
        from urllib3.exceptions import HTTPError  # noqa: PLC0415

        url = f"{self._options.url}/?{urlencode({'query': query, **(settings or {})})}"
        timeout = Timeout(connect=_CONNECT_S, read=_READ_S)
        try:
            answer = self._pool.request("POST", url, body=body, headers=self._headers, timeout=timeout, retries=False)
        except HTTPError as error:
            raise Outage(f"ClickHouse at {self._options.url} cannot be reached: {error}") from error
        if answer.status == 200 and "X-ClickHouse-Exception-Code" not in answer.headers:
            return answer.data
        raise _failure(answer.status, answer.headers, answer.data)


def _failure(status: int, headers: "HTTPHeaderDict", body: bytes) -> Outage | BadMessage:
    """The error in an answer. An answer without an exception code is that of a proxy."""
    text = " ".join(body.decode(errors="replace").split())[:600]
    code = headers.get("X-ClickHouse-Exception-Code", "")
    number = int(code) if code.isdecimal() else 0
    if number in _BAD_ROW:
        return BadMessage(text)
    what = "lower batch_bytes, or raise the proxy's limit" if status == 413 else _WHAT_TO_DO.get(number)
    return Outage(f"HTTP {status}: {text or 'no reason was given'}" + (f". What to do: {what}" if what else ""))


def _pool(options: ClickHouseOptions) -> "PoolManager":
    import urllib3  # noqa: PLC0415 - see above

    certificate, key = options.ssl_certificate_file, options.ssl_key_file
    return urllib3.PoolManager(
        maxsize=1,
        ca_certs=options.ssl_ca_file and str(options.ssl_ca_file),
        cert_file=certificate and str(certificate),
        key_file=key and str(key),
    )


def create(_name: str, options: ClickHouseOptions, _settings: Settings) -> ClickHouseSink:
    """Return the sink. Connects to nothing yet."""
    return ClickHouseSink(options)
