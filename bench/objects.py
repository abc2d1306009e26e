"""Compare storing and reading content with plain boto3: same bytes, same server, in turns.

Run `python -m bench.objects [--mb 100] [--rounds 3]`. It prints MB/s of content and the ratio to boto3, by the clock and by the
processor time of this process. Other work on the machine hardly changes processor time. The order changes from round to round.

`put` compresses, hashes and looks for an existing object. `read` decompresses and checks every frame. boto3's upload_file and
download_file do none of that, so their results are also shown with the time of a SHA-256 added.
"""

import argparse
import hashlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from evalstore.objects import object_store
from evalstore.objects.object_store import Store
from models.settings import Settings
from tests.seaweedfs import SeaweedFS


def text(size: int, seed: int) -> bytes:
    """Return text like the output of programs: lines of words and numbers, of which a third repeat."""
    rng = random.Random(seed)  # noqa: S311
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    lines = [
        f"{rng.choice(words)}:{rng.randint(1, 9999)} {' '.join(rng.choices(words, k=9))} {rng.random():.6f}\n"
        for _ in range(40_000)
    ]
    out = bytearray()
    while len(out) < size:
        out += "".join(rng.choices(lines, k=20_000)).encode()
        lines[: len(lines) // 3] = [f"{rng.random():.9f} {line[:60]}\n" for line in lines[: len(lines) // 3]]
    return bytes(out[:size])


class Taken(NamedTuple):
    """The seconds of an operation: by the clock, and of the processor for all threads of this process."""

    clock: float
    processor: float


def timed(act: Callable[[], object]) -> Taken:
    os.sync()  # Otherwise the operation would wait for earlier writes.
    start = time.perf_counter(), time.process_time()
    act()
    return Taken(time.perf_counter() - start[0], time.process_time() - start[1])


def drain(chunks: Iterator[bytes], path: Path) -> None:
    with path.open("wb") as out:
        for chunk in chunks:
            out.write(chunk)


def digest(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def one_round(store: Store, server: SeaweedFS, folder: Path, data: bytes, number: int) -> dict[str, Taken]:
    """Time each operation with the same new content, from a file and to a file, as boto3 requires."""
    client, source, target, key = server.client(), folder / "source", folder / "target", f"plain-{number}"
    source.write_bytes(data)
    kept: list[object_store.Put] = []

    def put() -> None:
        with source.open("rb") as file:
            kept.append(object_store.put(store, file))

    acts: dict[str, Callable[[], object]] = {
        "SHA-256": lambda: digest(source),
        "upload_file": lambda: client.upload_file(str(source), server.bucket, key),
        "put": put,
        "put again": put,
        "download_file": lambda: client.download_file(server.bucket, key, str(target)),
        "read": lambda: drain(object_store.read(store, kept[0].reference), target),
    }
    writing, reading = ["upload_file", "put", "put again"], ["download_file", "read"]
    if number % 2:
        writing, reading = ["put", "put again", "upload_file"], ["read", "download_file"]
    taken = {}
    for name in ["SHA-256", *writing, *reading]:
        taken[name] = timed(acts[name])
        if name in reading and target.read_bytes() != data:
            raise SystemExit("what was read is not what was stored")
        target.unlink(missing_ok=True)
    return taken


def measure(store: Store, server: SeaweedFS, folder: Path, make: Callable[[int], bytes], rounds: int) -> None:
    taken = [one_round(store, server, folder, make(number), number) for number in range(rounds)]
    size = (folder / "source").stat().st_size
    for what in Taken._fields:
        speed = {name: size / statistics.median(getattr(each[name], what) for each in taken) / 1e6 for name in taken[0]}
        for ours, theirs in (("put", "upload_file"), ("put again", "upload_file"), ("read", "download_file")):
            ratio, hashed = speed[ours] / speed[theirs], 1 / (1 / speed[theirs] + 1 / speed["SHA-256"])
            print(
                f"  {what:<9}  {ours:<9} {speed[ours]:7.0f} MB/s   {theirs:<13} {speed[theirs]:7.0f} MB/s   {ratio:.2f}", end=""
            )
            print(f"   and SHA-256 {hashed:7.0f} MB/s   {speed[ours] / hashed:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="of content, in millions of bytes")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size = arguments.mb * 1_000_000
    kinds: dict[str, Callable[[int], bytes]] = {
        "text": lambda seed: text(size, seed),
        "bytes that do not compress": lambda _: os.urandom(size),
    }
    with tempfile.TemporaryDirectory(prefix="evalstore-bench-", dir="/var/tmp") as name, SeaweedFS(Path(name)) as server:
        os.environ.update(server.environment)
        store = object_store.open_store(f"s3://{server.bucket}/bench", Settings(s3_endpoint_url=server.endpoint))
        warm = object_store.put(store, os.urandom(1000))
        print(f"warmed up with {warm.reference.size} bytes")
        for kind, make in kinds.items():
            print(f"{arguments.mb} MB of {kind}, median of {arguments.rounds}, S3 by SeaweedFS on this machine")
            measure(store, server, Path(name), make, arguments.rounds)
        server.kill()


if __name__ == "__main__":
    main()
