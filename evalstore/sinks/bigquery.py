"""BigQuery: each event a row, over the Storage Write API.

Rows go to a COMMITTED stream at offsets that this process counts, so a request that is repeated adds nothing. A process that
begins ends the stream of the process before, which then writes no more. It looks in the table for rows of the batch that was
begun. The libraries are imported when a sink is made: only the runner needs them. Their own retries are off.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from evalstore.sinks.bigquery_options import BigQueryOptions
from evalstore.sinks.bigquery_table import EventTable
from evalstore.sinks.event_row import COLUMNS, row
from evalstore.sinks.protocol import Batch, SinkEvent
from models.errors import BadMessage, Outage
from models.settings import Settings

if TYPE_CHECKING:
    from google.cloud.bigquery import Client
    from google.cloud.bigquery_storage_v1 import BigQueryWriteClient
    from google.cloud.bigquery_storage_v1.types import AppendRowsRequest, AppendRowsResponse

_T = TypeVar("_T")
_TIMEOUT_S: Final = 60.0
_REPEATS: Final = 4
_PAUSE_S: Final = 0.5
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
# google.rpc.Code
_INVALID_ARGUMENT: Final = 3
_ALREADY_EXISTS: Final = 6
_OUT_OF_RANGE: Final = 11
_PASSING: Final = {1, 2, 4, 10, 13, 14}
_BUFFERED: Final = "streaming buffer"


class BigQuerySink:
    """See `Sink` and `RepeatsBatches`."""

    def __init__(self, options: BigQueryOptions) -> None:
        self._options = options
        self._client, self._writer = _clients(options)
        self._events = EventTable(self._client, options)
        self._stream = ""
        self._offset = 0

    def resume(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """End the stream of the process before, and begin one. Raises Outage."""
        return self._translated(lambda: self._resume(state or {}))

    def _resume(self, state: dict[str, Any]) -> dict[str, Any]:
        from google.api_core.exceptions import NotFound  # noqa: PLC0415 - see above
        from google.cloud.bigquery_storage_v1.types import WriteStream  # noqa: PLC0415

        self._events.prepare()
        if before := state.get("stream"):
            with suppress(NotFound):  # BigQuery removes streams that nobody uses, and those of a table that is gone
                self._writer.finalize_write_stream(name=before, retry=None, timeout=_TIMEOUT_S)
        options = self._options
        parent = f"projects/{options.project}/datasets/{options.dataset}/tables/{options.table}"
        wanted = WriteStream(type_=WriteStream.Type.COMMITTED)
        self._stream = self._writer.create_write_stream(parent=parent, write_stream=wanted, retry=None, timeout=_TIMEOUT_S).name
        self._offset = 0
        return {"stream": self._stream}

    def write(self, batch: Batch) -> None:
        """Raises Outage, BadMessage."""
        events: Sequence[SinkEvent] = batch.events
        if batch.may_repeat:
            found = self._translated(lambda: self._events.existing(events))
            events = [event for event in events if (event.eval_id, event.event_id) not in found]
        if events:
            self._append([serialized(event) for event in events])

    def erase(self, eval_id: str) -> None:
        """Delete the rows. BigQuery refuses that for rows that it got lately; then Outage is raised, to try again."""
        self._translated(lambda: self._events.delete(eval_id))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._writer.transport.close()

    def _append(self, rows: list[bytes]) -> None:
        """Append rows at the offset. A request whose answer was lost is repeated with the same offset."""
        from google.api_core.exceptions import GoogleAPICallError  # noqa: PLC0415

        request, metadata = (
            _request(self._stream, self._offset, rows),
            (("x-goog-request-params", f"write_stream={self._stream}"),),
        )
        for repeat in range(_REPEATS):
            is_last = repeat == _REPEATS - 1
            try:
                (answer,) = self._writer.append_rows(iter([request]), metadata=metadata, retry=None, timeout=_TIMEOUT_S)
            except (GoogleAPICallError, ValueError) as error:
                code = getattr(getattr(error, "grpc_status_code", None), "value", (2,))[0]
                if code not in _PASSING or is_last:
                    raise _outage(error) from error
            else:
                if is_appended(answer, is_repeat=repeat > 0, is_last=is_last):
                    self._offset += len(rows)
                    return
            time.sleep(_PAUSE_S * 2**repeat)

    def _translated(self, work: Callable[[], _T]) -> _T:
        from google.api_core.exceptions import GoogleAPIError  # noqa: PLC0415
        from google.auth.exceptions import GoogleAuthError  # noqa: PLC0415
        from requests import RequestException  # noqa: PLC0415

        try:
            return work()
        except (GoogleAPIError, GoogleAuthError, RequestException, TimeoutError, ConnectionError) as error:
            raise _outage(error) from error


def is_appended(answer: "AppendRowsResponse", *, is_repeat: bool, is_last: bool) -> bool:
    """Whether the rows are in the table; False where the request is to be repeated. Raises Outage, BadMessage."""
    code, text = answer.error.code, answer.error.message
    if code == 0 or (code == _ALREADY_EXISTS and is_repeat):
        return True
    if code == _INVALID_ARGUMENT and answer.row_errors:
        raise BadMessage("; ".join(error.message for error in answer.row_errors[:3]) or text)
    if code in {_ALREADY_EXISTS, _OUT_OF_RANGE}:
        raise Outage(f"the stream does not stand where this process left it: {text}. It goes on with another stream")
    if code not in _PASSING or is_last:
        raise Outage(text or f"BigQuery refused rows with code {code}")
    return False


def serialized(event: SinkEvent) -> bytes:
    """The row as a protocol buffer."""
    values = {}
    for name, value in row(event).items():
        if value is not None:
            convert = _CONVERT.get(_SQL[name])
            values[name] = convert(value) if convert else value
    data: bytes = _message().__call__(**values).SerializeToString()
    return data


def _microseconds(text: str) -> int:
    return (datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND


def _json(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


_SQL: Final = {column.name: column.sql for column in COLUMNS}
_CONVERT: Final[dict[str, Callable[[Any], Any]]] = {"timestamptz": _microseconds, "jsonb": _json, "float8": float}


@cache
def _descriptor() -> Any:
    """The row's type: a field for each column."""
    from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto  # noqa: PLC0415

    field = FieldDescriptorProto
    types = {"timestamptz": field.TYPE_INT64, "int4": field.TYPE_INT64, "int8": field.TYPE_INT64, "float8": field.TYPE_DOUBLE}
    found = DescriptorProto(name="EvaluationEvent")
    for number, column in enumerate(COLUMNS, 1):
        type_ = types.get(column.sql, field.TYPE_STRING)
        found.field.add(name=column.name, number=number, type=type_, label=field.LABEL_OPTIONAL)
    return found


@cache
def _message() -> Any:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto  # noqa: PLC0415
    from google.protobuf.descriptor_pool import DescriptorPool  # noqa: PLC0415
    from google.protobuf.message_factory import GetMessageClass  # noqa: PLC0415

    file = FileDescriptorProto(name="evaluation_event.proto", package="evalstore", syntax="proto2")
    file.message_type.add().CopyFrom(_descriptor())
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("evalstore.EvaluationEvent"))


def _request(stream: str, offset: int, rows: list[bytes]) -> "AppendRowsRequest":
    from google.cloud.bigquery_storage_v1.types import AppendRowsRequest, ProtoRows, ProtoSchema  # noqa: PLC0415

    data = AppendRowsRequest.ProtoData(
        writer_schema=ProtoSchema(proto_descriptor=_descriptor()), rows=ProtoRows(serialized_rows=rows)
    )
    return AppendRowsRequest(write_stream=stream, offset=offset, proto_rows=data)


def _outage(error: Exception) -> Outage:
    text = str(error) or type(error).__name__
    if _BUFFERED in text:
        what = "the erasure waits until BigQuery has taken the rows out of the streaming buffer"
    else:
        what = {
            "NotFound": "create the table and its dataset; create = true makes the table, not the dataset",
            "Forbidden": "the account needs the roles BigQuery Data Editor and Job User",
            "PermissionDenied": "the account needs the roles BigQuery Data Editor and Job User",
            "DefaultCredentialsError": "set credentials_file, or give this process credentials of its environment",
            "ResourceExhausted": "a quota is used up: raise it, or wait",
        }.get(type(error).__name__, "")
    return Outage(text + (f". What to do: {what}" if what else ""))


def _clients(options: BigQueryOptions) -> tuple["Client", "BigQueryWriteClient"]:
    from google.api_core.client_options import ClientOptions  # noqa: PLC0415
    from google.auth.credentials import AnonymousCredentials  # noqa: PLC0415
    from google.cloud import bigquery  # noqa: PLC0415
    from google.cloud.bigquery_storage_v1 import BigQueryWriteClient  # noqa: PLC0415

    at = ClientOptions(api_endpoint=options.api_endpoint) if options.api_endpoint else None
    if options.is_emulator:
        from google.cloud.bigquery_storage_v1.services.big_query_write.transports import (  # noqa: PLC0415
            BigQueryWriteGrpcTransport,
        )
        from grpc import insecure_channel  # noqa: PLC0415

        client = bigquery.Client(options.project, credentials=AnonymousCredentials(), client_options=at)
        channel = insecure_channel(options.storage_endpoint)
        return client, BigQueryWriteClient(transport=BigQueryWriteGrpcTransport(channel=channel))
    if options.credentials_file is None:
        return bigquery.Client(options.project, client_options=at), BigQueryWriteClient()
    path = str(options.credentials_file)
    client = bigquery.Client.from_service_account_json(path, project=options.project, client_options=at)
    return client, BigQueryWriteClient.from_service_account_file(path)


def create(_name: str, options: BigQueryOptions, _settings: Settings) -> BigQuerySink:
    """Return the sink. Connects to nothing yet."""
    return BigQuerySink(options)
