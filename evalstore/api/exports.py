"""Exports: all matches of a list as lines of JSON, streamed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Connection
from starlette.responses import Response

from evalstore.api.problems import unavailable
from evalstore.api.rendering import ClosingStream
from evalstore.api.service import Service
from evalstore.storage import database

Read = Callable[[Connection], Generator[list[Any]]]


async def stream(
    service: Service, read: Read, encode: Callable[[Any], bytes], headers: Mapping[str, str] | None = None
) -> Response:
    """Stream what `read` yields, each item as a line. Each export keeps a connection, so only EXPORTS run at a time.

    Raises Problem (503), and the errors of `read` before its first chunk.
    """
    if service.exports.locked():
        raise unavailable("the service is busy with other exports")
    await service.exports.acquire()
    export = _Export(service, read, encode)
    try:
        first = await export.next()
    except BaseException:
        export.close()
        raise
    return ClosingStream(export.lines(first), export.close, media_type="application/x-ndjson", headers=headers)


class _Export:
    """An export in its own thread. The thread also ends the export after the client has disconnected."""

    def __init__(self, service: Service, read: Read, encode: Callable[[Any], bytes]) -> None:
        self._service, self._encode = service, encode
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evalstore-export")
        self._chunks = self._read(service, read)

    def _read(self, service: Service, read: Read) -> Generator[list[Any]]:
        with database.errors(), service.export_engine.connect() as conn:
            yield from read(conn)

    async def next(self) -> list[Any] | None:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: next(self._chunks, None))

    async def lines(self, chunk: list[Any] | None) -> AsyncIterator[bytes]:
        """Yield the lines of `chunk` and of all later chunks."""
        while chunk is not None:
            yield b"".join(self._encode(row) + b"\n" for row in chunk)
            chunk = await self.next()

    def close(self) -> None:
        self._thread.submit(self._chunks.close)
        self._thread.shutdown(wait=False)
        self._service.exports.release()
