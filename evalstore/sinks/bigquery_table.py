"""The table in BigQuery: making and checking it, finding events in it, deleting from it."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from evalstore.sinks.bigquery_options import BigQueryOptions
from evalstore.sinks.event_row import COLUMNS
from evalstore.sinks.protocol import SinkEvent
from models.errors import Outage

if TYPE_CHECKING:
    from google.cloud.bigquery import Client, QueryJobConfig, SchemaField, Table
    from google.cloud.bigquery.table import RowIterator

_TYPES: Final = {
    "text": "STRING",
    "uuid": "STRING",
    "timestamptz": "TIMESTAMP",
    "int4": "INTEGER",
    "int8": "INTEGER",
    "float8": "FLOAT",
    "jsonb": "JSON",
}
_OTHER_NAMES: Final = {"INT64": "INTEGER", "FLOAT64": "FLOAT"}
_NO_RETRY: Final[Any] = None  # which the annotations of the library do not know
_TIMEOUT_S: Final = 60.0


class EventTable:
    """A table of events. Raises the errors of google-api-core."""

    def __init__(self, client: "Client", options: BigQueryOptions) -> None:
        self._client, self._options = client, options
        self.name = f"{options.project}.{options.dataset}.{options.table}"

    def prepare(self) -> None:
        """Make the table and add columns where that is asked for, and check it. Raises Outage where it does not fit."""
        if self._options.create:
            self._create()
        table = self._client.get_table(self.name, retry=_NO_RETRY, timeout=_TIMEOUT_S)
        found = {field.name: field for field in table.schema}
        missing = [column.name for column in COLUMNS if column.name not in found]
        if missing and self._options.create:
            table.schema = [*table.schema, *(_field(column.name) for column in COLUMNS if column.name in missing)]
            self._client.update_table(table, ["schema"], retry=_NO_RETRY, timeout=_TIMEOUT_S)
        elif missing:
            added = ", ".join(
                f"ADD COLUMN `{column.name}` {_TYPES[column.sql]}" for column in COLUMNS if column.name in missing
            )
            raise Outage(f"the table lacks columns: ALTER TABLE `{self.name}` {added}, or set create = true")
        wrong = [
            f"{column.name} is {found[column.name].field_type}, not {_TYPES[column.sql]}"
            for column in COLUMNS
            if column.name in found and not _holds(found[column.name], _TYPES[column.sql])
        ]
        if wrong:
            what = "Change the table, or name another one"
            raise Outage(f"the table {self.name} has columns of other types: {', '.join(wrong)}. {what}")

    def _create(self) -> None:
        """Make the table: a partition for each day of `recorded_at`, clustered by `eval_id`."""
        from google.cloud import bigquery  # noqa: PLC0415 - only the runner needs it

        table: Table = bigquery.Table(self.name, schema=[_field(column.name) for column in COLUMNS])
        table.time_partitioning = bigquery.TimePartitioning(type_=bigquery.TimePartitioningType.DAY, field="recorded_at")
        table.clustering_fields = ["eval_id"]
        self._client.create_table(table, exists_ok=True, retry=_NO_RETRY, timeout=_TIMEOUT_S)

    def existing(self, events: Sequence[SinkEvent]) -> set[tuple[str, str]]:
        """Return which of these events are in the table, by `eval_id` and `event_id`."""
        from google.cloud import bigquery  # noqa: PLC0415

        times = [datetime.fromisoformat(event.fields["recorded_at"]) for event in events]
        # The days are literals, so that other partitions are not read.
        first, last = min(times).date(), max(times).date() + timedelta(days=1)
        query = f"""
SELECT eval_id, event_id FROM `{self.name}`
WHERE recorded_at >= TIMESTAMP '{first}' AND recorded_at < TIMESTAMP '{last}'
    AND eval_id IN UNNEST(@eval_ids) AND event_id IN UNNEST(@event_ids)
"""
        eval_ids = sorted({event.eval_id for event in events})
        parameters = [
            bigquery.ArrayQueryParameter("eval_ids", "STRING", eval_ids),
            bigquery.ArrayQueryParameter("event_ids", "STRING", [event.event_id for event in events]),
        ]
        # A cached result may lack rows that were appended since.
        config = bigquery.QueryJobConfig(query_parameters=parameters, use_query_cache=False)
        return {(row["eval_id"], row["event_id"]) for row in self._run(query, config)}

    def delete(self, eval_id: str) -> None:
        """Delete the rows of an evaluation."""
        from google.cloud import bigquery  # noqa: PLC0415

        parameters = [bigquery.ScalarQueryParameter("eval_id", "STRING", eval_id)]
        query = f"DELETE FROM `{self.name}` WHERE eval_id = @eval_id"
        config = bigquery.QueryJobConfig(query_parameters=parameters)
        self._run(query, config)

    def _run(self, query: str, config: "QueryJobConfig") -> "RowIterator":
        job = self._client.query(query, job_config=config, retry=_NO_RETRY, timeout=_TIMEOUT_S, job_retry=None)
        return job.result(retry=_NO_RETRY, timeout=_TIMEOUT_S, job_retry=None)


def _field(name: str) -> "SchemaField":
    """All are nullable: BigQuery adds no other columns to a table."""
    from google.cloud.bigquery import SchemaField  # noqa: PLC0415

    (sql,) = [column.sql for column in COLUMNS if column.name == name]
    return SchemaField(name, _TYPES[sql])


def _holds(field: "SchemaField", wanted: str) -> bool:
    is_plain = field.mode in {"NULLABLE", "REQUIRED"}
    return is_plain and _OTHER_NAMES.get(field.field_type, field.field_type) == wanted
