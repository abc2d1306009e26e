"""Dead letters and their operator: found, told apart, shown, edited, kept and removed."""

import base64
import json
import re
import stat
import subprocess
import time
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import Engine, text

from evalstore.storage import dead_letters
from tests.chaos.world import World, wait_until
from tests.integration.shell import KEYS, Operator, body, bury, dying, event, states
from worker.broker import Broker
from worker.dead_letter_mover import move


def kinds(world: World, number: int) -> dict[str, bytes | str]:
    """Ten messages that can never be stored, each for a reason of its own, by the words of it."""
    taken = {"event_id": str(UUID(int=1)), "eval_id": "taken"}
    return {
        "expected JSON": f"{{ no json {number}",
        "object": f"[{number}]",
        "fake": body(world, event(number), actor_name="fake"),
        "expected one event": body(world, number),
        "exit_code": body(world, event(number, exit_code=None)),
        "expected one of evaluation": body(world, event(number, type=f"evaluation:odd{number}")),
        "eval_id": body(world, event(number, eval_id=f"no name {number}")),
        "written by the system alone": body(
            world,
            {
                "type": "evaluation:lost",
                "eval_id": f"l{number}",
                "event_id": str(uuid4()),
                "occurred_at": "2026-01-01T00:00:00Z",
            },
        ),
        "already stored with another body": body(world, event(0, output=f"other {number}", **taken)),
        "NUL": body(world, event(number, metadata={f"m{number}": "\0"})),
    }


def test_of_ten_thousand_events_fifty_bad_ones_are_dead_letters_with_their_own_causes_in_ten_groups(
    world: World, operator: Operator
) -> None:
    workers = world.workers()
    workers.start()
    world.send([event(0, eval_id="taken")])
    wait_until(lambda: world.applied() == 1, what="the first is stored")
    good = [event(number) for number in range(1, 9950)]
    bad = {world_body: words for number in range(5) for words, world_body in kinds(world, number).items()}
    bodies = list(bad)
    for start in range(0, len(good), 200):
        world.send(good[start : start + 200])
        if bodies:
            world.raw(bodies.pop())
    wait_until(lambda: world.applied() == 9950 and len(operator.letters()) == 50, within_s=60, what="all are settled")
    world.wait_settled()

    found = operator.dlq("ls", "-o", "json").json
    wanted = {"id", "queue", "actor", "eval_id", "event_id", "error_class", "error_message", "signature", "first_at", "last_at"}
    assert all(letter.keys() >= wanted | {"deliveries", "state", "attempts", "host", "release", "redrives"} for letter in found)
    assert {letter["deliveries"] for letter in found} == {1}
    words_of = {key if isinstance(key, bytes) else key.encode(): words for key, words in bad.items()}
    for letter in operator.letters():
        words = words_of[bytes(letter["message"])]
        assert words in letter["error_message"], letter
        assert letter["error_class"] in letter["traceback"]
        assert letter["error_message"][:60] in letter["traceback"]
    groups = operator.dlq("groups", "-o", "json").json
    assert [group["count"] for group in groups] == [5] * 10
    assert {group["example"] for group in groups} <= {letter["id"] for letter in found}


def test_a_worker_killed_between_writing_a_dead_letter_and_removing_it_leaves_one(world: World, operator: Operator) -> None:
    dies, mark = dying(world.folder, script="remove_dead_letters", when="before")
    workers = world.workers(**dies)
    world.raw(body(world, event(1, exit_code="no")))
    workers.start(wait=False)
    wait_until(mark.exists, what="it dies")
    wait_until(lambda: world.client.zcard(KEYS.dead) == 1, what="the letter is still in Redis")
    assert len(operator.letters()) == 1
    workers.kill()
    workers.start()
    wait_until(lambda: world.client.zcard(KEYS.dead) == 0, what="it is removed")
    (letter,) = operator.letters()
    assert (letter["state"], letter["deliveries"], letter["error_class"]) == ("dead", 1, "InvalidEvent")


def test_a_message_under_a_made_up_id_is_a_dead_letter_like_any_other(
    world: World, operator: Operator, engine: Engine, broker: Broker
) -> None:
    for redis_id in ("dead-letter:", "dead-letter:no-uuid", "dead-letter:\udcff", f"dead-letter:{uuid4()}"):
        world.client.zadd(KEYS.dead, {redis_id.encode(errors="surrogateescape"): time.time() * 1000})
        world.client.hset(KEYS.dead_bodies, redis_id.encode(errors="surrogateescape"), "odd")
    with engine.connect() as conn:
        assert move(conn, broker, broker.lua) == 4
    assert len(operator.letters()) == 4


def test_whatever_is_wrong_with_a_message_its_letter_names_the_event(world: World, engine: Engine, broker: Broker) -> None:
    """Or `evalstore audit` would say that it is missing."""
    given = event(1)
    for number, wrong in enumerate(({"options": {"throws": ["x"], "retries": "x"}}, {"kwargs": []}, {"options": None})):
        world.client.zadd(KEYS.dead, {str(number): time.time() * 1000})
        world.client.hset(KEYS.dead_bodies, str(number), json.dumps(json.loads(body(world, given)) | wrong))
    with engine.connect() as conn:
        assert move(conn, broker, broker.lua) == 3
        found = conn.execute(text("SELECT actor, eval_id, event_id FROM dead_letters")).all()
    assert set(found) == {("store_evaluation", given["eval_id"], UUID(given["event_id"]))}


def test_without_a_terminal_nothing_is_changed_unless_told_so(world: World, operator: Operator, engine: Engine) -> None:
    letter_id = bury(engine, world, 3)[0]
    before = operator.letters()
    for words in (("redrive", "--all"), ("rm", "--all"), ("edit", letter_id, "--set", "event.exit_code=1")):
        with operator.start(*words, stdin=subprocess.PIPE) as process:  # No terminal, so nobody can confirm.
            process.communicate("y\n", timeout=60)
        assert process.returncode == 5
    assert operator.dlq("redrive", "--all", "--expect", "2", "--yes").status == 5
    assert operator.dlq("rm", "--all", "--expect", "4", "--yes").status == 5
    for verb in ("redrive", "rm"):
        assert operator.dlq(verb, "--yes").status == 2
        assert operator.dlq(verb, "--yes", "--limit", "1").status == 2
        assert operator.dlq(verb, "--yes", "--queue", "").status == 2
        assert operator.dlq(verb, "--yes", "--queue", "none").status == 3
        assert operator.dlq(verb, "--yes", uuid4()).status == 3
    assert operator.letters() == before
    assert operator.rows("SELECT * FROM operator_actions") == operator.rows("SELECT * FROM redrives") == []
    assert list(operator.folder.glob("*.jsonl")) == []


def test_for_many_letters_their_number_is_typed(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 1001)
    for typed in ("y\n", "1000\n", "\x04"):
        assert operator.at_terminal("redrive", "--all", "--detach", types=typed).status == 5
    assert states(operator) == {"dead": 1001}
    done = operator.at_terminal("redrive", "--all", "--detach", types="1,001\n")
    assert done.status == 0, done.out
    assert states(operator) == {"redriving": 1001}


def test_for_few_letters_yes_is_typed(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 2)
    assert operator.at_terminal("rm", "--all", types="n\n").status == 5
    assert operator.at_terminal("rm", "--all", types="y\n").status == 0
    assert operator.letters() == []


def test_an_edited_letter_is_stored_and_the_old_one_kept(world: World, operator: Operator) -> None:
    world.workers().start()
    old = body(world, event(1, exit_code="zero", metadata={"tags": ["a"]}))
    world.raw(old)
    wait_until(lambda: len(operator.letters()) == 1, what="it is a dead letter")
    letter = str(operator.letters()[0]["id"])
    refused = operator.dlq("edit", letter, "--set", 'event.exit_code="1"', "--yes")
    assert (refused.status, "exit_code" in refused.err) == (1, True)
    for wrong in ("event.exit_code=one", "event.none.there=1", "event.metadata.tags.7=1", "nothing"):
        assert operator.dlq("edit", letter, "--set", wrong, "--yes").status == 2
    assert list(operator.folder.glob("*.jsonl")) == []
    done = operator.dlq(
        "edit", letter[:8], "--set", "event.exit_code=1", "--unset", "event.metadata.tags.0", "--reason", "typo", "--yes"
    )
    assert done.status == 0, done.err
    assert '-      "exit_code": "zero"' in done.err
    assert '+      "exit_code": 1' in done.err
    (row,) = operator.letters()
    assert (str(row["id"]), row["state"], row["redrives"], row["deliveries"]) == (letter, "stored", 1, 1)
    (kept,) = operator.folder.glob("evalstore-dlq-*.jsonl")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert base64.b64decode(json.loads(kept.read_text())["message_b64"]) == old
    (action,) = operator.dlq("actions", "-o", "json").json
    assert (action["verb"], action["reason"], action["details"]["export"]) == ("edit", "typo", str(kept))
    (record,) = operator.rows("SELECT exit_code, metadata FROM evaluations")
    assert record == {"exit_code": 1, "metadata": {"tags": []}}


def test_an_editor_mends_even_what_is_no_json(world: World, operator: Operator, engine: Engine) -> None:
    world.workers().start()
    world.raw(body(world, event(1)).decode() + "}")
    wait_until(lambda: len(operator.letters()) == 1, what="it is a dead letter")
    operator.env["EDITOR"] = "sed -i s/}$//"
    done = operator.dlq("edit", operator.letters()[0]["id"], "--editor", "--yes")
    assert done.status == 0, done.err
    (row,) = operator.letters()
    assert (row["state"], row["actor"], row["eval_id"]) == ("stored", "store_evaluation", "run-1")


def test_removed_letters_are_kept_first_and_stay_where_they_cannot_be(world: World, operator: Operator, engine: Engine) -> None:
    ids = bury(engine, world, 25)
    messages = {one["id"]: bytes(one["message"]) for one in operator.letters()}
    refused = operator.dlq("rm", "--all", "--yes", "--export-dir", operator.folder / "none")
    assert refused.status == 1
    assert len(operator.letters()) == 25
    done = operator.dlq("rm", ids[0], ids[1], uuid4(), "--yes", "--reason", "no use", "-o", "json")
    assert (done.status, done.json["removed"]) == (4, 2)
    done = operator.dlq("rm", "--match", "OUTPUT", "--limit", "20", "--yes")
    assert done.status == 0, done.err
    assert len(operator.letters()) == 3
    kept: dict[UUID, bytes] = {}
    for path in operator.folder.glob("evalstore-dlq-*.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        kept |= {
            UUID(one["id"]): base64.b64decode(one["message_b64"]) for one in map(json.loads, path.read_text().splitlines())
        }
    assert kept | {one["id"]: bytes(one["message"]) for one in operator.letters()} == messages
    assert len(kept) == 22
    assert [one["count"] for one in operator.dlq("actions", "-o", "json").json] == [20, 2]


def test_letters_on_their_way_are_neither_removed_nor_edited_nor_sent_again(
    world: World, operator: Operator, engine: Engine
) -> None:
    letter_id = bury(engine, world, 2)[0]
    assert operator.dlq("redrive", "--all", "--yes", "--detach").status == 0
    assert operator.dlq("rm", letter_id, "--yes").status == 3
    assert operator.dlq("redrive", letter_id, "--yes").status == 3
    assert operator.dlq("edit", letter_id, "--set", "event.exit_code=1", "--yes").status == 1
    assert states(operator) == {"redriving": 2}


def test_an_export_holds_every_message_as_it_came(world: World, operator: Operator, engine: Engine) -> None:
    odd = event(7, output="\ud800 \0 \x1b[31m", metadata={"x": [1, 2.5, None]})
    bury(engine, world, 3, events=[event(1), event(2), odd])
    done = operator.dlq("export", "--to", "-")
    assert done.status == 0, done.err
    found = {one["eval_id"]: one for one in map(json.loads, done.out.splitlines())}
    messages = {one["eval_id"]: bytes(one["message"]) for one in operator.letters()}
    assert {eval_id: base64.b64decode(one["message_b64"]) for eval_id, one in found.items()} == messages
    assert found["run-7"]["message"]["args"] == [odd]
    assert operator.dlq("export", "--to", "out.jsonl").status == 0
    assert stat.S_IMODE((operator.folder / "out.jsonl").stat().st_mode) == 0o600
    assert operator.dlq("export", "--to", "out.jsonl").status == 1
    assert operator.dlq("export", "--queue", "none").status == 3


def test_each_filter_selects_its_dead_letters(world: World, operator: Operator, engine: Engine) -> None:
    events = [event(1), event(2, metadata={"who": "Zoë 100%"}), event(3)]
    ids = bury(engine, world, 3, events=events)
    with psycopg.connect(world.database_url) as conn:
        conn.execute(
            "UPDATE dead_letters SET last_at = now() - interval '3 days', error_class = 'Other' WHERE eval_id = 'run-3'"
        )

    def chosen(*words: object) -> set[str]:
        done = operator.dlq("ls", "-o", "json", *words)
        assert done.status == (0 if done.json else 3), done.err
        return {one["eval_id"] for one in done.json}

    everything = {"run-1", "run-2", "run-3"}
    assert chosen() == chosen("--queue", "evaluations") == everything
    assert chosen(ids[0], str(ids[2])[:13]) == {"run-1", "run-3"}
    assert chosen("--error-class", "Other") == {"run-3"}
    assert chosen("--eval-id", "run-2") == chosen("--match", "Zoë 100%") == {"run-2"}
    assert chosen("--match", "100_") == chosen("--match", "Zo% 100%") == set()
    assert chosen("--since", "2d") == {"run-1", "run-2"}
    assert chosen("--until", "2d") == {"run-3"}
    assert chosen("--since", "2020-01-01T00:00:00Z", "--until", "2020-01-02T00:00:00+01:00") == set()
    assert chosen("--signature", dead_letters.signature("InvalidEvent", "output"), "--limit", "2") < everything
    assert operator.dlq("ls", "--since", "2026-01-01").status == 2
    assert operator.dlq("ls", "zz").status == 2
    assert operator.dlq("ls", "--match", b"\xff".decode(errors="surrogateescape")).status == 2


def test_tables_fit_a_terminal_of_eighty_columns_and_move_no_cursor(world: World, operator: Operator, engine: Engine) -> None:
    hostile = event(1, eval_id="x" * 200) | {"output": "\x1b[2J\u202e"}
    (letter_id,) = bury(engine, world, 1, events=[hostile])
    with psycopg.connect(world.database_url) as conn:
        conn.execute("UPDATE dead_letters SET error_message = %s", ["\x1b[2J[bold]\u202e日本語 " * 30])
    operator.dlq("redrive", "--all", "--yes", "--detach", "--actor", "\x1b[2J" * 20)
    for words in (("ls",), ("groups",), ("redrives",), ("actions",)):
        done = operator.dlq(*words)
        assert done.status == 0, done.err
        lines = done.out.rstrip("\n").split("\n")
        assert len(lines) == 2 or (words == ("groups",) and len(lines) <= 6), done.out
        assert max(map(len, lines)) <= 80, done.out
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.out)
    shown = operator.dlq("show", letter_id)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.out)
    assert "exit_code" in shown.out
    assert "Traceback" in shown.out
    whole = operator.dlq("show", letter_id, "-o", "json").json
    assert whole["message"]["args"][0]["output"] == "\x1b[2J\u202e"
    assert operator.dlq("show", uuid4()).status == 3


def test_without_a_server_it_says_so_and_changes_nothing(world: World, operator: Operator, engine: Engine) -> None:
    bury(engine, world, 2)
    operator.env["EVALSTORE_REDIS_URL"] = "redis://127.0.0.1:1/0"
    assert operator.dlq("redrive", "--all", "--yes").status == 7
    assert states(operator) == {"dead": 2}
    assert operator.dlq("ls").status == 0
    operator.env["EVALSTORE_DATABASE_URL"] = "postgresql://127.0.0.1:1/none"
    assert operator.dlq("ls").status == 7
