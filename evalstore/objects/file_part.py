"""Read a part of an open file as a separate file."""

import io
import os


class FilePart(io.RawIOBase):
    """A part of an open file as a file, so that threads upload parts without reading them into memory."""

    def __init__(self, file: int, start: int, stop: int) -> None:
        self._file, self._start, self._length, self._position = file, start, stop - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        data = os.pread(self._file, left if size is None or size < 0 else min(size, left), self._start + self._position)
        self._position += len(data)
        return data
