"""A sink of your own: it appends each event to a file, as a line of JSON.

    [audit-file]
    type = "jsonl"
    path = "/var/log/evaluations.jsonl"

Copy this folder, `pip install` it where `evalstore sinks run` runs, and name its entry point as the type.
"""

import os
from pathlib import Path

from pydantic import Field

from evalstore.sinks import BadMessage, Batch, Outage
from evalstore.sinks import Options as CommonOptions


class JsonLines:
    """One thread calls this. An error of the disk is an outage: the same batch comes again when the disk has room."""

    class Options(CommonOptions):
        """The keys of the table in the sinks file, besides those that all sinks have."""

        path: Path
        max_line_bytes: int = Field(default=1_000_000, ge=100)

    def __init__(self, _name: str, options: Options) -> None:
        self._options = options

    def write(self, batch: Batch) -> None:
        lines = []
        for event in batch:
            if len(event.json) > self._options.max_line_bytes:
                raise BadMessage(f"a line of {len(event.json)} bytes; max_line_bytes is {self._options.max_line_bytes}")
            lines.append(event.json + b"\n")
        self._append(b"".join(lines))

    def erase(self, eval_id: str) -> None:
        """Rewrite the file without the evaluation."""
        path, kept = self._options.path, self._options.path.with_suffix(".new")
        mark = f'"eval_id":"{eval_id}"'.encode()
        try:
            with path.open("rb") as old, kept.open("wb") as new:
                new.writelines(line for line in old if mark not in line)
                os.fsync(new.fileno())
            kept.replace(path)
        except OSError as error:
            raise Outage(str(error)) from error

    def _append(self, data: bytes) -> None:
        try:
            with self._options.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Outage(str(error)) from error
