"""The hook of a real `inspect eval` sends its samples; its own log says the same."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest

from models import merge
from models.events import parse
from models.record import Record
from tests.integration import recorded
from tests.integration.recorded import sent, types

Json = dict[str, Any]

_OWN = recorded.ROOT / ".tools/inspect/bin/python"
PYTHON = str(_OWN) if _OWN.exists() else sys.executable
pytestmark = pytest.mark.skipif(
    not _OWN.exists() and find_spec("inspect_ai") is None, reason="run `make setup-integrations`: needs inspect-ai"
)

TASK = """
import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, accuracy, includes, mean, scorer
from inspect_ai.solver import solver

tries = {}

def answer(input, tools, tool_choice, config):
    output = ModelOutput.from_content("mockllm/model", "The answer is 42")
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # counting tokens would need the network
    return output

@solver
def solve_it():
    async def solve(state, generate):
        tries[state.uuid] = tries.get(state.uuid, 0) + 1
        if state.sample_id == "retried" and tries[state.uuid] < 2:
            raise ValueError("only once")
        if state.sample_id == "broken":
            raise ValueError("always")
        if state.sample_id == "slow":
            await anyio.sleep(60)
        for _ in range(5 if state.sample_id == "talkative" else 1):
            state = await generate(state)
        return state
    return solve

@scorer(metrics=[mean()])
def length():
    async def score(state, target):
        return Score(value=len(state.output.completion) / 2, explanation="half the length")
    return score

@task
def sums():
    samples = [Sample(id=id, input=f"What is 6 x 7? {id}", target="42" if id != "wrong" else "43")
               for id in ("right", "wrong", "retried", "broken", "slow", "talkative")]
    return Task(dataset=samples, solver=solve_it(), scorer=[includes(), length()], epochs=2, time_limit=3, message_limit=4,
                model=get_model("mockllm/model", custom_outputs=answer))
"""


def evaluate(folder: Path, redis_url: str, **environment: str) -> tuple[Json, str]:
    """Run `inspect eval`. Return its log and its output."""
    (folder / "sums.py").write_text(TASK)
    program = "from inspect_ai._cli.main import main; main()"
    arguments = ["eval", "sums.py", "--log-format", "json", "--log-dir", str(folder / "logs"), "--display", "none"]
    arguments += ["--retry-on-error", "1", "--no-fail-on-error"]
    given = {**os.environ, "EVALSTORE_REDIS_URL": redis_url, "PYTHONPATH": str(recorded.ROOT), **environment}
    done = subprocess.run(
        [PYTHON, "-c", program, *arguments], cwd=folder, env=given, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [log] = (folder / "logs").glob("*.json")
    return json.loads(log.read_text()), done.stdout + done.stderr


def record(redis_url: str, eval_id: str) -> Record:
    return merge([parse(event) for event in sent(redis_url, eval_id)])


def test_the_evaluations_equal_the_samples_scores_and_errors_of_the_log_of_inspect(redis_url: str, tmp_path: Path) -> None:
    log, output = evaluate(tmp_path, redis_url, EVALSTORE_INSPECT="on")
    assert "Exception calling hook" not in output
    samples = {sample["uuid"]: sample for sample in log["samples"]}
    assert len(samples) == 12
    assert {event["eval_id"] for event in sent(redis_url)} == set(samples)
    statuses = {"right": "completed", "wrong": "completed", "retried": "completed", "talkative": "completed"}
    statuses |= {"broken": "failed", "slow": "timed_out"}
    for uuid, sample in samples.items():
        stored = record(redis_url, uuid)
        assert (stored.status, stored.run_id) == (statuses[sample["id"]], log["eval"]["run_id"])
        assert stored.metadata["sample_id"] == sample["id"]
        assert stored.metadata["epoch"] == sample["epoch"]
        assert stored.metadata["task"] == "sums"
        assert stored.metadata["model"] == "mockllm/model"
        assert stored.code == sample["input"]
        scores = {name: score["value"] for name, score in (sample.get("scores") or {}).items()}
        assert stored.metadata.get("scores", {}) == scores
        if stored.status == "completed":
            assert stored.score == {"C": 1.0, "I": 0.0}[scores["includes"]]
        assert stored.metadata.get("limit", {}).get("type") == (sample.get("limit") or {}).get("type")
        error = sample.get("error")
        assert stored.error == (f"{error['message']}\n{error['traceback']}" if error else None)
        assert stored.attempt == 1 + len(sample.get("error_retries") or [])
        assert stored.duration_ms == pytest.approx(sample["total_time"] * 1000)
        assert [json.loads(line)["uuid"] for line in stored.output.splitlines()] == [each["uuid"] for each in sample["events"]]


def test_each_retry_of_a_sample_is_an_attempt_with_its_error(redis_url: str, tmp_path: Path) -> None:
    log, _ = evaluate(tmp_path, redis_url, EVALSTORE_INSPECT="on")
    [retried, *_] = [sample["uuid"] for sample in log["samples"] if sample["id"] == "retried"]
    events = sent(redis_url, retried)
    assert types(events) == ["queued", "started", "failed", "started 2", "completed 2"]
    assert "only once" in events[2]["error"]


def test_the_hook_does_nothing_unless_it_is_turned_on(redis_url: str, tmp_path: Path) -> None:
    _, output = evaluate(tmp_path, redis_url, EVALSTORE_REDIS_URL="redis://127.0.0.1:1/0")
    assert sent(redis_url) == []
    assert "Exception" not in output


def test_the_entry_point_loads_neither_tasks_nor_the_settings() -> None:
    look = (
        "import sys; from evalstore.inspect_hooks import EvalstoreHooks; assert not EvalstoreHooks().enabled()\n"
        "print([name for name in ('tasks', 'models', 'dramatiq', 'redis') if name in sys.modules])"
    )
    given = {**os.environ, "PYTHONPATH": str(recorded.ROOT)}
    done = subprocess.run([PYTHON, "-c", look], env=given, capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout == "[]\n", done.stderr


def test_an_eval_that_is_interrupted_cancels_its_samples(redis_url: str, tmp_path: Path, eventually: Any) -> None:
    (tmp_path / "sums.py").write_text(TASK.replace('("right", "wrong", "retried", "broken", "slow", "talkative")', '("slow",)'))
    given = {**os.environ, "EVALSTORE_REDIS_URL": redis_url, "PYTHONPATH": str(recorded.ROOT), "EVALSTORE_INSPECT": "on"}
    arguments = ["eval", "sums.py", "--log-dir", str(tmp_path / "logs"), "--display", "none", "--time-limit", "60"]
    program = "from inspect_ai._cli.main import main; main()"
    with subprocess.Popen([PYTHON, "-c", program, *arguments], cwd=tmp_path, env=given, stdout=subprocess.PIPE) as process:
        eventually(lambda: types(sent(redis_url)).count("started") == 2, within_s=40)
        process.send_signal(SIGINT)
        process.communicate(timeout=30)
    for eval_id in {event["eval_id"] for event in sent(redis_url)}:
        assert types(sent(redis_url, eval_id)) == ["queued", "started", "cancelled"]
