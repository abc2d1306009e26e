"""What the spool's files can look like after a crash, a bad disk or a full one, and what is made of it."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InvalidSettings, RedisOutage, SpoolFull
from models.settings import Settings
from tasks.spool import Spool, SpoolRecord

ROOT = Path(__file__).parents[2]
IDS = st.text("0123456789abcdef-", min_size=1, max_size=36).map(str.encode)
RECORDS = st.builds(
    SpoolRecord, st.integers(0, 2**63), IDS, st.binary(max_size=300).map(lambda body: body.replace(b"\n", b" "))
)


class Sent:
    """Takes what a spool forwards; it fails once it has taken `most` batches."""

    def __init__(self, most: int = 1_000_000) -> None:
        self.batches: list[list[str | bytes]] = []
        self.most = most

    def __call__(self, arguments: list[str | bytes]) -> None:
        if len(self.batches) == self.most:
            raise RedisOutage("away")
        self.batches.append(arguments)

    @property
    def bodies(self) -> list[bytes]:
        return [bytes(body) for batch in self.batches for body in batch[1::2] if isinstance(body, bytes)]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", max_bytes=1_000_000)


def segments(spool: Spool) -> list[Path]:
    return sorted(spool.folder.glob("*.spool"))


def keep(spool: Spool, *bodies: str) -> None:
    spool.append([part for body in bodies for part in (f"id-{body}", body)])


# ---- records


@given(RECORDS)
def test_a_record_is_one_line_and_comes_back(record: SpoolRecord) -> None:
    line = record.line()
    assert line.index(b"\n") == len(line) - 1
    assert SpoolRecord.parse(line) == record


@given(RECORDS)
def test_a_record_cut_off_anywhere_is_damaged_unless_it_lacks_its_line_break_alone(record: SpoolRecord) -> None:
    line = record.line()
    for length in range(len(line) - 1):
        assert SpoolRecord.parse(line[:length]) is None
    assert SpoolRecord.parse(line[:-1]) == record


@given(RECORDS, st.data())
def test_a_record_of_which_any_byte_is_another_is_damaged(record: SpoolRecord, data: st.DataObject) -> None:
    line = bytearray(record.line())
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= data.draw(st.integers(1, 255))
    assert SpoolRecord.parse(bytes(line)) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_damaged_or_a_record_and_never_an_error(line: bytes) -> None:
    assert SpoolRecord.parse(line) is None


# ---- what a crash leaves


def test_cut_off_at_any_byte_all_whole_records_and_all_later_ones_are_forwarded(tmp_path: Path) -> None:
    whole = Spool(tmp_path / "whole", max_bytes=1_000_000)
    keep(whole, "1", "22", "333")
    data = segments(whole)[0].read_bytes()
    ends = [place for place in range(len(data)) if data[place : place + 1] == b"\n"]
    for length in range(len(data) + 1):
        spool = Spool(tmp_path / f"cut-{length}", max_bytes=1_000_000)
        spool.folder.mkdir()
        (spool.folder / segments(whole)[0].name).write_bytes(data[:length])
        keep(spool, "later")
        there = [body for body, end in zip([b"1", b"22", b"333"], ends, strict=True) if length >= end]
        torn = length not in {0, *ends, *(end + 1 for end in ends)}
        sent = Sent()
        assert spool.status()[:1] == (len(there) + 1,)
        assert spool.forward(sent) == (len(there) + 1, torn)
        assert sent.bodies == [*there, b"later"]
        assert len(list(spool.folder.glob("*.bad"))) == torn
        assert not spool.holds()


def test_zeros_that_a_power_failure_left_hide_nothing(spool: Spool) -> None:
    keep(spool, "1")
    with segments(spool)[0].open("ab") as file:
        file.write(bytes(1000))
    keep(spool, "2")
    sent = Sent()
    assert spool.forward(sent) == (2, 1)
    assert sent.bodies == [b"1", b"2"]


def test_damaged_lines_are_kept_aside_and_the_others_sent(spool: Spool) -> None:
    keep(spool, "1", "2", "3")
    path = segments(spool)[0]
    spoilt = path.read_bytes().replace(b"id-2 2", b"id-2 ?")
    path.write_bytes(spoilt)
    sent = Sent()
    assert spool.forward(sent) == (2, 1)
    assert sent.bodies == [b"1", b"3"]
    assert path.with_suffix(".bad").read_bytes() == spoilt
    assert spool.status() == (0, 0, None, 1)


def test_a_damaged_line_is_kept_aside_also_by_a_forwarder_that_begins_after_it(spool: Spool) -> None:
    keep(spool, *(str(number) for number in range(1200)))
    path = segments(spool)[0]
    path.write_bytes(path.read_bytes().replace(b"id-2 2", b"id-2 ?"))
    with pytest.raises(RedisOutage):
        spool.forward(Sent(most=1))
    sent = Sent()
    assert Spool(spool.folder, max_bytes=1).forward(sent) == (699, 0)
    assert sent.bodies[0] == b"501"
    assert spool.status().damaged == 1


def test_what_was_moved_aside_can_be_mended_and_given_back(spool: Spool) -> None:
    keep(spool, "1")
    path = segments(spool)[0]
    good = path.read_bytes()
    path.write_bytes(good.replace(b"1\n", b"?\n"))
    spool.forward(Sent())
    path.with_suffix(".bad").write_bytes(good)
    path.with_suffix(".bad").rename(path)
    sent = Sent()
    assert spool.forward(sent) == (1, 0)
    assert sent.bodies == [b"1"]


# ---- order and progress


def test_messages_come_in_the_order_in_which_they_were_kept_over_any_number_of_segments(tmp_path: Path) -> None:
    bodies = [str(number) for number in range(50)]
    for body in bodies:  # as many processes would
        keep(Spool(tmp_path, max_bytes=100_000, segment_bytes=200), body)
    spool = Spool(tmp_path, max_bytes=100_000)
    assert len(segments(spool)) > 5
    sent = Sent()
    spool.forward(sent)
    assert sent.bodies == [body.encode() for body in bodies]


def test_a_clock_that_goes_back_does_not_change_the_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=100_000, segment_bytes=1)
    keep(spool, "1")
    future = tmp_path / f"{9 * 10**18:020d}.spool"
    segments(spool)[0].rename(future)
    keep(spool, "2", "3")
    sent = Sent()
    spool.forward(sent)
    assert sent.bodies == [b"1", b"2", b"3"]


def test_what_was_confirmed_is_not_sent_again_and_what_was_not_stays(spool: Spool) -> None:
    keep(spool, *(str(number) for number in range(1200)))
    first, second = Sent(most=1), Sent()
    with pytest.raises(RedisOutage):
        spool.forward(first)
    assert spool.status().messages == 700
    keep(spool, "last")
    Spool(spool.folder, max_bytes=1).forward(second)
    assert first.bodies + second.bodies == [str(number).encode() for number in [*range(1200), "last"]]


@pytest.mark.parametrize("noted", [b"", b"\0" * 70, b"rubbish", b"%b %020d %020d\n", b"%b 99999999999999999999 %020d\n"])
def test_progress_that_is_none_means_from_the_beginning(spool: Spool, noted: bytes) -> None:
    keep(spool, "1", "2")
    name = segments(spool)[0].name.encode()
    (spool.folder / "forward.lock").write_bytes(noted % ((name, 0, 0)[: noted.count(b"%")]) if b"%" in noted else noted)
    sent = Sent()
    spool.forward(sent)
    assert sent.bodies == [b"1", b"2"]


def test_a_bulk_is_kept_in_its_order_and_counted_by_message(spool: Spool) -> None:
    spool.append(["a", "1", "b", b"2"])
    status = spool.status()
    assert status.messages == 2
    assert status.bytes == segments(spool)[0].stat().st_size
    assert status.oldest_age_s is not None
    assert 0 <= status.oldest_age_s < 60
    sent = Sent()
    assert spool.forward(sent) == (2, 0)
    assert sent.batches == [[b"a", b"1", b"b", b"2"]]


def test_a_spool_that_never_was_holds_nothing(spool: Spool) -> None:
    assert not spool.holds()
    assert spool.status() == (0, 0, None, 0)
    assert spool.forward(Sent()) == (0, 0)


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o077, 0o700, 0o600), (0o022, 0o750, 0o640), (0o002, 0o770, 0o660)])
def test_modes_follow_the_umask_and_give_others_nothing(spool: Spool, umask: int, folder: int, file: int) -> None:
    before = os.umask(umask)
    try:
        keep(spool, "secret")
    finally:
        os.umask(before)
    assert spool.folder.stat().st_mode & 0o777 == folder
    assert {path.stat().st_mode & 0o777 for path in spool.folder.iterdir()} == {file}


def test_what_is_kept_while_a_torn_end_is_looked_at_is_forwarded_too(spool: Spool) -> None:
    keep(spool, "1")
    path = segments(spool)[0]
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    bodies: list[str | bytes] = []

    def send(arguments: list[str | bytes]) -> None:
        if not bodies:
            keep(spool, "2")
        bodies.extend(arguments[1::2])

    assert spool.forward(send) == (2, 0)
    assert bodies == [b"1", b"2"]


def test_of_several_forwarders_one_works_at_a_time_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    keep(Spool(tmp_path, max_bytes=1_000_000), *(str(number) for number in range(3000)))
    bodies: list[str | bytes] = []
    at_work = threading.Lock()

    def send(arguments: list[str | bytes]) -> None:
        assert at_work.acquire(blocking=False)
        time.sleep(0.01)
        bodies.extend(arguments[1::2])
        at_work.release()

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(Spool(tmp_path, max_bytes=1).forward, send) for _ in range(4)]
    assert sorted(each.result().sent for each in done) == [0, 0, 0, 3000]
    assert bodies == [str(number).encode() for number in range(3000)]


# ---- no room


def test_beyond_its_bound_it_is_full_and_keeps_all_or_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=200)
    keep(spool, "1")
    with pytest.raises(SpoolFull, match="200 bytes"):
        spool.append(["a", "2", "b", "3" * 200])
    keep(spool, "4")
    sent = Sent()
    spool.forward(sent)
    assert sent.bodies == [b"1", b"4"]
    keep(spool, "5")  # there is room again


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system writes that much of a file and refuses the rest, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_could_be_written_in_part_alone_leaves_nothing(spool: Spool) -> None:
    with files_of_at_most(300):
        with pytest.raises(SpoolFull, match="File too large"):
            keep(spool, "1" * 400)
        assert segments(spool) == []
        keep(spool, "2")
        before = segments(spool)[0].read_bytes()
        with pytest.raises(SpoolFull):
            keep(spool, "3" * 400)
        assert segments(spool)[0].read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_full_spool(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolFull, match="Not a directory"):
        keep(Spool(tmp_path / "file/spool", max_bytes=100), "1")


@pytest.mark.parametrize("path", ["spool", "./spool", "~/spool"])
def test_the_folder_is_an_absolute_path(path: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^EVALSTORE_SPOOL_DIR: expected a path that begins with /$"):
        Settings.from_environment({"EVALSTORE_SPOOL_DIR": path})
    assert Settings.from_environment({"EVALSTORE_SPOOL_DIR": "/var/spool/e"}).spool_dir == Path("/var/spool/e")
    assert Settings.from_environment({}).spool_dir is None


# ---- processes

_HOLDER = """
import os, sys, time
from pathlib import Path
from tasks.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=10**6)
spool.append(["id", "body"])
forwards = os.pipe()
def send(arguments):
    os.write(forwards[1], b"x")
    time.sleep(600)
spool.keep_forwarding(send)
os.read(forwards[0], 1)  # from now on the thread holds the lock
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""

_FORWARDER = """
import sys
from pathlib import Path
from tasks.spool import Spool
print(*Spool(Path(sys.argv[1]), max_bytes=1).forward(print))
"""


def test_a_forwarder_that_waits_for_another_lets_greenlets_run(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under gevent `time.sleep` runs other greenlets; flock(2) blocks all of them while another process waits for Redis."""
    sent = Sent()
    keep(spool, "a")

    def give_up(_signal: int, _frame: object) -> None:
        raise TimeoutError("flock(2) blocked")

    signal.signal(signal.SIGALRM, give_up)
    with (spool.folder / "forward.lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(other, fcntl.LOCK_UN))
        signal.alarm(10)
        try:
            spool.forward(sent)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert sent.bodies == [b"a"]


def test_a_forked_child_does_not_hold_the_lock_that_its_parent_died_with(spool: Spool, eventually: Callable[..., None]) -> None:
    command = [sys.executable, "-c", _HOLDER, str(spool.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        try:
            eventually(lambda: not locks_of(child), within_s=20, what="the child lets go of the locks")
            parent.kill()
            parent.wait()
            done = subprocess.run(
                [*command[:2], _FORWARDER, command[3]], cwd=ROOT, stdout=subprocess.PIPE, timeout=20, check=True
            )
            assert done.stdout.splitlines()[-1] == b"1 0"
        finally:
            parent.kill()
            os.kill(child, signal.SIGKILL)


def locks_of(pid: int) -> list[str]:
    return [path for fd in Path(f"/proc/{pid}/fd").iterdir() if (path := str(fd.readlink())).endswith(".lock")]
