"""Run all programs of the platform once. Progress goes to standard output, one JSON object a line."""

import argparse
import itertools
import json
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from .executor import Execution, Limits, execute
from .gateway import Gateway, Stopped
from .problems import ProblemsMissing, Program, programs


class Platform:
    """Executors behind a gateway. At SIGINT and SIGTERM they cancel running programs; waiting evaluations stay queued."""

    def __init__(self, ledger: Path, run: str, jobs: int) -> None:
        self.stop = threading.Event()
        self._gateway = Gateway(ledger, self.stop)
        self._run, self._jobs, self._limits = run, jobs, Limits()
        self._stop_fd, self._stop_write = os.pipe()

    def on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the shape of a signal handler
        if not self.stop.is_set():
            self.stop.set()
            os.close(self._stop_write)

    def run_all(self, todo: list[Program]) -> int:
        """Enqueue and run all programs. Return the number of evaluations whose end was reported."""
        done = 0
        report(of=len(todo), done=done)
        with ThreadPoolExecutor(self._jobs, "executor") as pool:
            results: list[Future[None]] = []
            try:
                for program in todo:
                    eval_id = f"{self._run}:{program.name}:{program.variant}"
                    self._gateway.send(
                        "evaluation:queued",
                        eval_id,
                        code=program.code.encode(),
                        language="python",
                        submitter="platform",
                        metadata={"benchmark": "HumanEval", "problem": program.name, "variant": program.variant},
                    )
                    results.append(pool.submit(self._evaluate, eval_id, program))
                for result in as_completed(results):
                    result.result()
                    done += 1
                    report(of=len(todo), done=done)
            except Stopped:
                pass
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return done

    def _evaluate(self, eval_id: str, program: Program) -> None:
        if self.stop.is_set():
            raise Stopped
        executor_id = f"{socket.gethostname()}:{os.getpid()}:{threading.current_thread().name}"
        self._gateway.send("evaluation:started", eval_id, executor_id=executor_id, timeout_s=self._limits.wall_s)
        files = {"program.py": program.code.encode()}
        execution = execute(program.argv, files=files, limits=self._limits, stop_fd=self._stop_fd)
        if self.stop.is_set():
            self._gateway.send("evaluation:cancelled", eval_id, reason="the platform was stopped")
            raise Stopped
        self._gateway.send(f"evaluation:{execution.outcome}", eval_id, executor_id=executor_id, **facts(execution))


def facts(execution: Execution) -> dict[str, object]:
    """Return the fields of the event that reports `execution`."""
    error = execution.error
    if execution.outcome == "failed":
        error = b"\n\n".join(part for part in (execution.failure.encode(), error) if part)
    return {
        "exit_code": execution.exit_code,
        "output": execution.output,
        "error": error,
        "duration_ms": execution.duration_ms,
        "memory_bytes": execution.memory_bytes,
    }


def report(*, of: int, done: int) -> None:
    print(json.dumps({"of": of, "done": done}), flush=True)


def main() -> int:
    """Return exit status 0 if all were reported, 1 if there is nothing to run, 130 after a signal."""
    parser = argparse.ArgumentParser(prog="python -m examples.platform", description=__doc__)
    parser.add_argument("--ledger", type=Path, required=True, help="the JSONL file that every sent event is added to")
    parser.add_argument("--run", default=f"{datetime.now(UTC):%Y%m%dT%H%M%S}", help="what every eval_id begins with")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="executors (default: one for each core)")
    parser.add_argument("--limit", type=int, help="how many evaluations to run (default: all)")
    arguments = parser.parse_args()
    try:
        todo = list(itertools.islice(programs(), arguments.limit))
    except ProblemsMissing as error:
        print(error, file=sys.stderr)
        return 1
    platform = Platform(arguments.ledger, arguments.run, arguments.jobs)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, platform.on_signal)
    platform.run_all(todo)
    return 130 if platform.stop.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
