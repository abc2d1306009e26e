"""Compare the HTTP service with a FastAPI application that returns a constant: `python -m bench.http [--rounds 5] [--seconds
4]`.

Both run in one process with the same server options. The constant is as long as a record's JSON. They alternate under wrk,
which must be installed, with 32 connections that request 300 different records. Then two clients send batches of 10,000 events
to the service.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

import httpx
from fastapi import FastAPI
from starlette.responses import Response

from bench.events import events
from bench.place import Place
from evalstore.local.servers import free_port

_KEY: Final = "benchmark"
_RECORDS: Final = 300
_BATCH: Final = 10_000
_CONSTANT: Final = os.environ.get("BENCH_CONSTANT", "").encode()
_SCRIPT: Final = """
local paths, at = { %s }, 0
request = function()
  at = at %% #paths + 1
  return wrk.format("GET", paths[at], { Authorization = "Bearer benchmark" })
end
"""

constant = FastAPI()


@constant.get("/constant")
async def _answer() -> Response:
    return Response(_CONSTANT, media_type="application/json")


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, *command], env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str) -> None:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        try:
            httpx.get(url)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(url)


def requests_per_s(url: str, script: Path, seconds: int) -> float:
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "-s", str(script), url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(output)
    match = re.search(r"Requests/sec:\s+([\d.]+)", output)
    return float(match[1]) if match else 0.0


def script(folder: Path, name: str, paths: list[str]) -> Path:
    path = folder / f"{name}.lua"
    path.write_text(_SCRIPT % ", ".join(f'"{request_path}"' for request_path in paths))
    return path


def batches(url: str, count: int) -> float:
    """Return the events stored per second."""
    stream = events(count * _BATCH, seed=time.time_ns())
    bodies = [b"\n".join(json.dumps(event).encode() for event in islice(stream, _BATCH)) for _ in range(count)]
    headers = {"Authorization": f"Bearer {_KEY}", "Content-Type": "application/x-ndjson"}

    def send(body: bytes) -> None:
        answer = httpx.post(f"{url}/storage/events:batch", content=body, headers=headers, timeout=120)
        if answer.text.count('"applied"') != _BATCH:
            raise RuntimeError(answer.text[:500])

    with ThreadPoolExecutor(2) as pool:
        start = time.perf_counter()
        list(pool.map(send, bodies))
        return count * _BATCH / (time.perf_counter() - start)


def compare(place: Place, rounds: int, seconds: int) -> None:
    api_port, constant_port = free_port(), free_port()
    api, other = f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{constant_port}"
    servers = {
        "EVALSTORE_DATABASE_URL": place.postgres.url(),
        "EVALSTORE_REDIS_URL": place.valkey.url(),
        "EVALSTORE_API_HOST": "127.0.0.1",
        "EVALSTORE_API_PORT": str(api_port),
        "EVALSTORE_READ_API_KEYS": _KEY,
        "EVALSTORE_WRITE_API_KEYS": _KEY,
    }
    headers = {"Authorization": f"Bearer {_KEY}"}
    results: dict[str, list[float]] = {"constant": [], "records": []}
    with running(["-m", "evalstore.api"], **servers):
        wait_for(f"{api}/health/live")
        sent: list[dict[str, Any]] = list(events(_RECORDS * 3))
        body = b"\n".join(json.dumps(event).encode() for event in sent)
        lines = {**headers, "Content-Type": "application/x-ndjson"}
        httpx.post(f"{api}/storage/events:batch", content=body, headers=lines).raise_for_status()
        paths = [f"/storage/evaluations/{eval_id}" for eval_id in dict.fromkeys(ratio["eval_id"] for ratio in sent)]
        record = httpx.get(api + paths[0], headers=headers).content
        uvicorn = ["-m", "uvicorn", "bench.http:constant", "--no-access-log", "--no-server-header", "--log-level=warning"]
        with running([*uvicorn, f"--port={constant_port}"], BENCH_CONSTANT=record.decode()):
            wait_for(f"{other}/constant")
            scripts = {"constant": ["/constant"], "records": paths}
            for _ in range(rounds):
                for name, url in (("constant", other), ("records", api)):
                    results[name].append(requests_per_s(url, script(place.folder, name, scripts[name]), seconds))
        rates = [batches(api, 6) for _ in range(max(1, rounds // 2))]
    ratios = [record / constant for record, constant in zip(results["records"], results["constant"], strict=True)]
    for name, values in results.items():
        print(f"{name:10} {statistics.median(values):10,.0f} requests/s")
    print(f"{'ratio':10} {statistics.median(ratios):10.2f}    of {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print(f"{'batches':10} {statistics.median(rates):10,.0f} events/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    chosen = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed")
    with Place(None) as place:
        compare(place, chosen.rounds, chosen.seconds)


if __name__ == "__main__":
    main()
