"""The command `evalstore`: what it prints where, and with which status it exits."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import Connection, text

from evalstore.cli.output import escaped, to_json
from evalstore.storage import database, dead_letters, event_store
from evalstore.storage.dead_letters import DeadLetterInsert
from models.events import parse
from tasks.keys import Keys
from tests.factories import unique_event as event
from tests.integration.commands import python

Json = dict[str, Any]
Evalstore = Callable[..., subprocess.CompletedProcess[bytes]]
ROOT = Path(__file__).parents[2]
AWAY = {
    "EVALSTORE_DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/x",
    "EVALSTORE_REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
}
COMMANDS = ("up", "demo", "migrate", "status", "send", "get", "audit")
# Terminals act on these characters, so no output may contain them.
CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
NASTY = "[bold]x[/bold] \x1b[31m\x1b]0;title\x07\x9b2J \u202egnp.exe\u2066 \r\x08\x7f :smile: é😀"


@pytest.fixture
def evalstore(database_url: str, redis_url: str) -> Evalstore:
    """Run the command with the test's own servers, or with other variables."""

    def run(*arguments: str | Path, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
        servers = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("EVALSTORE_", "COLUMNS"))}
        of_an_interpreter = variables.keys() & {"PYTHONIOENCODING", "LC_ALL"}
        command = [*([sys.executable] if of_an_interpreter else python()), "-m", "evalstore.cli.app", *map(str, arguments)]
        done = subprocess.run(
            command,
            input=stdin,
            env={**environment, **servers, **variables},
            cwd=ROOT,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
        assert b"hunter2" not in done.stdout + done.stderr
        return done

    return run


def store(database_url: str, *events: Json) -> None:
    with connected(database_url) as conn:
        event_store.store(conn, [parse(one) for one in events])


@contextmanager
def connected(database_url: str) -> Iterator[Connection]:
    engine = database.engine(database_url)
    try:
        with engine.connect() as conn:
            yield conn
    finally:
        engine.dispose()


def lines(path: Path, *values: object) -> Path:
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in values))
    return path


# ---- usage


def test_help_is_there_for_every_command(evalstore: Evalstore) -> None:
    overview = evalstore("--help")
    assert overview.returncode == 0
    for number in (0, 1, 2, 3, 4, 5, 7):
        assert re.search(rf"\b{number} [a-z]", overview.stdout.decode())
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", overview.stdout.decode(), re.MULTILINE)
        shown = evalstore(command, "--help")
        assert (shown.returncode, shown.stderr) == (0, b"")
        text = shown.stdout.decode()
        assert f"Usage: evalstore {command}" in text.replace("python -m evalstore.cli.app", "evalstore")
        assert max(map(len, text.splitlines())) <= 80
        if command in {"status", "send", "get", "audit"}:
            assert "table|json|jsonl" in text


def test_which_release_it_is_is_told_whatever_the_settings_are(evalstore: Evalstore) -> None:
    done = evalstore("--version", EVALSTORE_REDIS_URL="nonsense")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"evalstore {metadata.version('evalstore')}\n", b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["get"],
        ["get", "e", "--outputs"],
        ["get", "e", "--output", "--code"],
        ["get", "e", "-o", "xml"],
        ["send", "/nowhere/at-all"],
        ["send", "/"],
        ["audit", "/nowhere/at-all"],
        ["cron", "run", "sweep_objects", "--wait", "-1"],
        ["audit", "/"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(evalstore: Evalstore, arguments: Sequence[str]) -> None:
    done = evalstore(*arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_folder_that_cannot_be_used_is_named_in_a_line(evalstore: Evalstore, command: str) -> None:
    done = evalstore(command, "--dir", "/dev/null/data")
    assert done.returncode == 1
    assert re.search(rb"/dev/null/data\S*: Not a directory\n\Z", done.stderr)


def test_invalid_settings_exit_with_2_and_are_all_named_in_one_line(evalstore: Evalstore) -> None:
    wrong = {"EVALSTORE_DATABASE_URL": "hunter2", "EVALSTORE_REDIS_URL": "hunter2", "EVALSTORE_MAX_CONTENT_BYTES": "hunter2"}
    done = evalstore("status", **wrong)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
    for name in wrong:
        assert name.encode() in done.stderr
    done = evalstore("status", EVALSTORE_DATABASE_URL="postgresql://u:hunter2@127.0.0.1/x?nonsense=1")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"EVALSTORE_DATABASE_URL" in done.stderr


INTERRUPTED_WHILE_IT_LOADS = """
import sys
from evalstore.cli import entry

class Interrupt:
    def find_spec(self, name, *given):
        if name == "sqlalchemy":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
entry.main()
"""


def test_ctrl_c_while_the_command_loads_ends_it_without_a_traceback() -> None:
    command = [sys.executable, "-c", INTERRUPTED_WHILE_IT_LOADS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_it_sends_says_up_to_which_line_it_came(redis_url: str) -> None:
    command = [sys.executable, "-c", "from evalstore.cli.entry import main; main()", "send", "-", "-o", "jsonl"]
    environment = {**os.environ, "EVALSTORE_REDIS_URL": redis_url}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as sending:  # type: ignore[call-overload]
        sending.stdin.write(b'{"type": "evaluation:queued", "eval_id": "e", "code": ""}\n' * 1_500)
        sending.stdin.flush()
        assert json.loads(sending.stdout.readline())["line"] == 1  # Each report follows a send, a thousand lines at a time.
        sending.send_signal(signal.SIGINT)
        _, notices = sending.communicate(timeout=20)
    assert notices == b"1,000 sent, 0 bad; lines from 1,001 on may not be sent\n"
    assert sending.returncode == 130


@pytest.mark.parametrize("away", AWAY, ids=str)
def test_an_outage_exits_with_7_and_one_line_and_soon(evalstore: Evalstore, tmp_path: Path, away: str) -> None:
    file = lines(tmp_path / "events.jsonl", event("started"))
    database_alone: list[list[str | Path]] = [["migrate"], ["get", "e"]]
    needs = database_alone if away == "EVALSTORE_DATABASE_URL" else [["send", file]]
    for arguments in (["status"], ["audit", file], *needs):
        began = time.monotonic()
        done = evalstore(*arguments, **{away: AWAY[away]})
        assert time.monotonic() - began < 20
        assert (done.returncode, bool(done.stdout)) == (7, arguments == ["status"]), arguments
        last = done.stderr.decode().splitlines()[-1]
        assert re.match("(PostgreSQL|Redis) cannot be used: .*; its address is in EVALSTORE_(DATABASE|REDIS)_URL$", last)
        assert len(done.stderr.splitlines()) == (2 if arguments[0] == "send" else 1)


def test_a_database_without_tables_is_told_what_to_run(evalstore: Evalstore, empty_database_url: str) -> None:
    done = evalstore("get", "e", EVALSTORE_DATABASE_URL=empty_database_url)
    assert done.returncode == 7
    assert b"run `evalstore migrate`" in done.stderr
    assert evalstore("migrate", EVALSTORE_DATABASE_URL=empty_database_url).returncode == 0
    assert evalstore("get", "e", EVALSTORE_DATABASE_URL=empty_database_url).returncode == 3


@pytest.mark.parametrize(
    ("variable", "changed", "server", "said"),
    [
        ("EVALSTORE_DATABASE_URL", ("://", "://nobody:hunter2@"), "postgresql", "nobody"),
        ("EVALSTORE_DATABASE_URL", ("/test_", "/no_test_"), "postgresql", 'database "no_test_'),
        ("EVALSTORE_REDIS_URL", ("://", "://:hunter2@"), "redis", "password"),
        ("EVALSTORE_REDIS_URL", ("/", "/9"), "redis", "DB index is out of range"),
    ],
)
def test_what_is_not_ready_says_why_in_the_servers_words(
    evalstore: Evalstore, database_url: str, redis_url: str, variable: str, changed: tuple[str, str], server: str, said: str
) -> None:
    url = {"EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}[variable]
    wrong = changed[1].join(url.rsplit(changed[0], 1)) if changed[0] != "://" else re.sub("://([^@]*@)?", changed[1], url)
    done = evalstore("health", "--ready", "-o", "json", **{variable: wrong})
    assert done.returncode == (1 if server == "postgresql" else 7)  # Wrong settings, or a refusing server.
    states = {row["server"]: row["state"] for row in json.loads(done.stdout)}
    assert said in states[server]


def test_a_schema_of_another_release_is_told_as_what_it_is(evalstore: Evalstore, database_url: str) -> None:
    with connected(database_url) as conn, conn.begin():
        conn.execute(text("UPDATE evalstore_schema_version SET version_num = 'future'"))
    ready, status = evalstore("health", "--ready", "-o", "json"), evalstore("status")
    assert (ready.returncode, status.returncode) == (1, 1)
    assert "at revision future, which this release does not know: deploy a newer one" in ready.stdout.decode()
    assert "at revision future, which this release does not know: deploy a newer one" in status.stderr.decode()


@pytest.mark.parametrize(
    "command",
    ["archive status", "archive sweep", "archive sweep --dry-run", "keys list", "dlq actions", "dlq redrives", "dlq ls"],
)
def test_where_there_is_nothing_a_sentence_says_so_instead_of_a_head_without_a_table(
    evalstore: Evalstore, tmp_path: Path, command: str
) -> None:
    store = {"EVALSTORE_OBJECT_STORE_URL": f"file://{tmp_path}"}
    done = evalstore(*command.split(), **store)
    assert (done.returncode, done.stdout) == (0, b"")
    assert re.match(rb"(there (is|are) no|no )", done.stderr)
    assert json.loads(evalstore(*command.split(), "-o", "json", **store).stdout or b"[]") == [] or command == "archive status"


# ---- send


def test_sending_stores_the_good_lines_and_names_the_bad_ones_by_line_and_field(
    evalstore: Evalstore, tmp_path: Path, redis_url: str
) -> None:
    file = lines(
        tmp_path / "events.jsonl",
        event("queued", "one", code="x"),
        b"not json",
        event("completed", "two", exitcode=1, attempt=0),
        b"",
        b'{"type": "evaluation:started", "eval_id": "\xff"}',
        [],
        {"type": "evaluation:started", "eval_id": "six"},
        event("started", "bad/id", **{"\x1b[31m": 1, "\ud800": 2}),
    )
    done = evalstore("send", file)
    assert (done.returncode, done.stdout) == (4, b"")
    told = done.stderr.decode().splitlines()
    assert [line.split(":")[0] for line in told] == ["line 2", "line 3", "line 5", "line 6", "line 8", "2 sent, 5 bad"]
    for field in ("exit_code: ", "exitcode: ", "attempt: ", "did you mean exit_code?"):
        assert field in told[1]
    for field in ("eval_id: ", r"\x1b[31m: ", r"\ud800: "):
        assert field in told[4]
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen("dramatiq:evaluations") == 2


def test_sending_nothing_is_fine_and_sending_nothing_good_is_a_failure(evalstore: Evalstore, tmp_path: Path) -> None:
    assert evalstore("send", lines(tmp_path / "empty.jsonl")).returncode == 0
    assert evalstore("send", lines(tmp_path / "blank.jsonl", b"", b"  ")).returncode == 0
    assert evalstore("send", lines(tmp_path / "bad.jsonl", b"{")).returncode == 1


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_sending_gives_the_ids_it_filled_in_for_an_audit(evalstore: Evalstore, tmp_path: Path, form: str) -> None:
    events = [event("started", event_id=None), event("started")]
    done = evalstore("send", "-", "-o", form, stdin=lines(tmp_path / "events.jsonl", *events, b"{").read_bytes())
    assert done.returncode == 4
    rows = json.loads(done.stdout) if form == "json" else [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["line"], row["eval_id"]) for row in rows] == [(1, "e"), (2, "e")]
    assert UUID(rows[0]["event_id"]).version == 7
    assert rows[1]["event_id"] == events[1]["event_id"]
    audit = evalstore("audit", lines(tmp_path / "sent.jsonl", *rows), "-o", form)
    assert (audit.returncode, audit.stdout.count(b'"in flight"')) == (0, 2)


# ---- get


def test_get_of_an_unknown_evaluation_exits_with_3(evalstore: Evalstore, database_url: str) -> None:
    store(database_url, event("started"))
    for arguments in (["none"], ["e", "--output"], ["a/b"], ["x\x1b[31m"], [b"\xff".decode(errors="surrogateescape")]):
        done = evalstore("get", *arguments)
        assert (done.returncode, done.stdout) == (3, b""), arguments
        assert not CODES.search(done.stderr.decode())


def test_content_is_written_as_it_is_and_an_empty_one_is_no_missing_one(evalstore: Evalstore, database_url: str) -> None:
    nasty = f"{NASTY}\n\0\ud800"
    store(database_url, event("queued", code=""), event("failed", output=nasty, error_b64="//4="))
    expected = {"--code": b"", "--output": nasty.encode("utf-8", "surrogatepass"), "--error": b"\xff\xfe"}
    for option, data in expected.items():
        done = evalstore("get", "e", option)
        assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")


def nasty_record(database_url: str) -> Json:
    metadata = {NASTY.replace("\0", ""): [NASTY], "text": "word " * 40}
    store(
        database_url,
        event("queued", code=NASTY, submitter=NASTY, language=NASTY, run_id="r", metadata=metadata),
        event("completed", exit_code=-(2**63), score=-0.5, output="\ud800\0\x1b[2J", error_b64="/5s=", executor_id="x" * 1000),
    )
    return metadata


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_the_record_as_json_says_all_and_holds_no_terminal_codes(evalstore: Evalstore, database_url: str, form: str) -> None:
    metadata = nasty_record(database_url)
    done = evalstore("get", "e", "-o", form)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    assert not CODES.search(text)
    assert text.count("\n") == 1
    record = json.loads(text)
    expected = {
        "eval_id": "e",
        "status": "completed",
        "version": 2,
        "submitter": NASTY,
        "language": NASTY,
        "run_id": "r",
        "metadata": metadata,
        "exit_code": -(2**63),
        "score": -0.5,
        "code": NASTY,
        "output": "\ud800\0\x1b[2J",
        "error_b64": "/5s=",
        "finished_at": "2026-01-31T09:30:00Z",
        "reason": None,
    }
    assert {name: record[name] for name in expected} == expected


def test_the_record_as_a_table_fits_80_columns_and_holds_neither_terminal_codes_nor_markup(
    evalstore: Evalstore, database_url: str
) -> None:
    nasty_record(database_url)
    for variables in ({}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}):
        done = evalstore("get", "e", **variables)
        assert done.returncode == 0
        text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout.decode()) if "FORCE_COLOR" in variables else done.stdout.decode()
        assert "[bold]x[/bold]" in text
        assert r"\x1b[31m" in text
        assert r"\u202e" in text
        assert ":smile:" in text
        assert max(map(len, text.splitlines())) <= 80 or "PYTHONIOENCODING" in variables
        assert not CODES.search(text)


def test_large_content_is_shown_by_its_size_and_beginning(evalstore: Evalstore, database_url: str) -> None:
    store(database_url, event("queued", code="x" * 70_000))
    record = json.loads(evalstore("get", "e", "-o", "json").stdout)
    assert (record["code_size"], record["code_preview"]) == (70_000, "x" * 1024)
    assert "code" not in record
    assert len(evalstore("get", "e", "--code").stdout) == 70_000


# ---- status


def test_status_counts_what_is_queued_stored_and_dead(evalstore: Evalstore, database_url: str, tmp_path: Path) -> None:
    assert json.loads(evalstore("status", "-o", "json").stdout)["evaluations"] == {}
    store(database_url, event("started", "a"), event("started", "b"), event("completed", "c", exit_code=0))
    evalstore("send", lines(tmp_path / "events.jsonl", event("started", "d")))
    bury(database_url, event("started", "dead"))
    for form in ("json", "jsonl"):
        shown = json.loads(evalstore("status", "-o", form).stdout)
        assert shown["evaluations"] == {"completed": 1, "running": 2}
        assert shown["queue"] == {"ready": 1, "inflight": 0, "delayed": 0, "dead": 1}
    table = evalstore("status").stdout.decode()
    assert re.search(r"evaluations +1 completed, 2 running\n", table)
    assert re.search(r"evaluations +1 +0 +0 +1 ", table)
    assert "no worker runs" in table
    assert max(map(len, table.splitlines())) <= 80


# ---- audit


def message(one: Json) -> bytes:
    fields = {"queue_name": "evaluations", "actor_name": "store_evaluation", "args": [one], "kwargs": {}, "options": {}}
    return json.dumps({**fields, "message_id": str(uuid4()), "message_timestamp": 1}).encode()


def bury(database_url: str, one: Json) -> None:
    """Keep `one` as a dead letter."""
    now = datetime.now(UTC)
    letter = DeadLetterInsert(
        uuid4(), "evaluations", "store_evaluation", one["eval_id"], UUID(one["event_id"]), message(one),
        "InvalidEvent", "code: \ud800\0", "", "", 10**30, now, None, None,
    )  # fmt: skip
    with connected(database_url) as conn:
        dead_letters.write(conn, [letter])
        dead_letters.write(conn, [letter._replace(died_at=datetime.now(UTC))])


def test_audit_tells_applied_in_flight_dead_and_missing(
    evalstore: Evalstore, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    keys = Keys.of("dramatiq", "evaluations")
    applied, kept, waiting, delayed, dying, missing = (event("started", name) for name in ("a", "b", "c", "d", "e", "f"))
    store(database_url, applied)
    bury(database_url, kept)
    bury(database_url, applied)  # A dead letter with another body of the event changes nothing.
    with redis.Redis.from_url(redis_url) as client:
        client.hset(keys.bodies, "1", message(waiting))
        client.hset(keys.bodies, "2", b"rubbish")
        client.hset(keys.bodies, "3", b'{"args": 5, "message_id": []}')
        client.hset(keys.stock_delayed_bodies, "4", message(delayed))
        client.hset(keys.dead_bodies, "5", message(dying))
    everything = [applied, kept, waiting, delayed, dying, missing]
    other = {**applied, "eval_id": "z"}  # The same event_id in another evaluation is another event.
    file = lines(tmp_path / "all.jsonl", *everything, applied, other)
    done = evalstore("audit", file, "-o", "json")
    assert done.returncode == 1
    fates = [(row["eval_id"], row["fate"]) for row in json.loads(done.stdout)]
    assert fates == [
        *[("a", "applied"), ("b", "dead"), ("c", "in flight"), ("d", "in flight")],
        *[("e", "dead"), ("f", "missing"), ("z", "missing")],
    ]
    table = evalstore("audit", file)
    assert table.returncode == 1
    counts = dict(re.findall(r"^(applied|in flight|dead|missing) +(\d+)$", table.stdout.decode(), re.MULTILINE))
    assert counts == {"applied": "1", "in flight": "2", "dead": "2", "missing": "2"}
    assert f"missing: f {missing['event_id']}" in table.stderr.decode()
    assert evalstore("audit", lines(tmp_path / "most.jsonl", *everything[:-1])).returncode == 0
    assert evalstore("audit", lines(tmp_path / "none.jsonl")).returncode == 0


def test_audit_names_the_lines_that_name_no_event(evalstore: Evalstore, database_url: str, tmp_path: Path) -> None:
    stored = event("started")
    store(database_url, stored)
    bad = [b"{", [], 5, {}, {**stored, "eval_id": "\0"}, {**stored, "eval_id": "\ud800"}, {**stored, "event_id": "x"}, b"\xff"]
    done = evalstore("audit", lines(tmp_path / "events.jsonl", *bad, stored))
    assert done.returncode == 4
    assert [line.split(":")[0] for line in done.stderr.decode().splitlines()] == [f"line {number}" for number in range(1, 9)]
    missing = evalstore("audit", lines(tmp_path / "events.jsonl", *bad, event("started")))
    assert missing.returncode == 1


# ---- output


def test_a_reader_that_goes_away_is_no_error_to_talk_about(
    evalstore: Evalstore, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    store(database_url, event("queued", code="x" * 60_000, submitter="s" * 1000))
    file = lines(tmp_path / "events.jsonl", *(event("started", "f") for _ in range(3000)))
    environment = {**os.environ, "EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url, "PY": sys.executable}
    for command in ("get e", "get e -o json", "get e --code", f"send {file} -o jsonl", f"audit {file} -o jsonl", "--help"):
        shell = f'"$PY" -m evalstore.cli.app {command} | true'
        done = subprocess.run(shell, shell=True, env=environment, cwd=ROOT, capture_output=True, timeout=60, check=False)  # noqa: S602
        assert b"Traceback" not in done.stderr
        assert b"BrokenPipe" not in done.stderr
        assert b"Exception" not in done.stderr


@pytest.mark.parametrize(("stdout", "says"), [(">/dev/full", "No space left on device"), (">&-", "")], ids=["full", "closed"])
def test_output_that_cannot_be_written_is_told_in_a_line(
    database_url: str, redis_url: str, tmp_path: Path, stdout: str, says: str
) -> None:
    store(database_url, event("queued", code="x" * 60_000))
    file = lines(tmp_path / "events.jsonl", event("started"))
    environment = {**os.environ, "EVALSTORE_DATABASE_URL": database_url, "EVALSTORE_REDIS_URL": redis_url}
    for command in ("get e", "get e -o json", "get e --code", "status", f"audit {file} -o jsonl", "keys list", "--help"):
        program = f"{shlex.join(python())} -m evalstore.cli.app"
        if says == "":
            program = f"{shlex.quote(sys.executable)} -c 'from evalstore.cli.entry import main; main()'"
        shell = f"{program} {command} {stdout}"
        done = subprocess.run(["sh", "-c", shell], env=environment, cwd=ROOT, capture_output=True, timeout=60, check=False)
        told = done.stderr.decode().splitlines()
        assert "Traceback" not in done.stderr.decode(), command
        if says and command != "keys list":  # There is nothing to print for it.
            assert (done.returncode, told[-1]) == (1, f"standard output: {says}"), command


@pytest.mark.parametrize("value", [NASTY, "\0\ud800\x1b", ["\x9b"], {"\u202e": "\x1b"}, "é😀"], ids=ascii)
def test_json_is_exact_and_harmless(value: object) -> None:
    assert json.loads(to_json(value)) == value
    assert not CODES.search(to_json(value))
    assert to_json(value).encode()


def test_what_is_escaped_is_one_harmless_line() -> None:
    assert not CODES.search(escaped(NASTY + "\n\t\ud800\udfff"))
    assert "\n" not in escaped("a\nb")
    assert escaped("[bold] é😀") == "[bold] é😀"
