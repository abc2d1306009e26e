"""Full disks and dropped packets without a machine of one's own: a test in user, mount and network namespaces of its own.

In them it is root, whoever runs it (user_namespaces(7)): it may mount a small disk and lay a network, which go when it ends.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from typing import Final, ParamSpec

import pytest

from tests.chaos.relay import ROOT

_Given = ParamSpec("_Given")
_UNSHARE: Final = ("unshare", "--map-root-user", "--mount", "--net", "--fork", "--kill-child")
_ENTER: Final = (*_UNSHARE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
_INSIDE: Final = "EVALSTORE_IN_NAMESPACES"


def in_namespaces(test: Callable[_Given, None]) -> Callable[_Given, None]:
    """Make a test run by itself, in a pytest of its own, in such namespaces; it is skipped where the kernel forbids them."""

    @wraps(test)
    def run(*given: _Given.args, **named: _Given.kwargs) -> None:
        if os.environ.get(_INSIDE):
            test(*given, **named)
            return
        if not _allowed():
            pytest.skip("the kernel gives this user no namespaces")
        node = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        with tempfile.TemporaryDirectory() as folder:
            # pytest's usual folder would delete files of other runs that still use them.
            options = ["-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
            done = subprocess.run(
                [*_ENTER, sys.executable, "-m", "pytest", *options, node],
                cwd=ROOT,
                env={**os.environ, _INSIDE: "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stdout

    return run


@cache
def _allowed() -> bool:
    attempt = [*_ENTER, "sysctl", "-w", "net.ipv4.ip_forward=1"]
    return subprocess.run(attempt, check=False, capture_output=True).returncode == 0


class Disk:
    """A small disk in memory at `folder`."""

    def __init__(self, folder: Path, *, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "disk", folder], check=True)

    @contextmanager
    def full(self, *, but_bytes: int = 0) -> Iterator[None]:
        """Taken up by somebody else, but for so much."""
        taken = self.folder / "somebody-else's"
        with taken.open("wb") as file:
            while (room := self._room() - but_bytes) > 0:
                # Another writer may have removed entries since the listing.
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)
        yield
        taken.unlink()

    def _room(self) -> int:
        space = os.statvfs(self.folder)
        return space.f_bavail * space.f_frsize


class Network:
    """A client's network, reached from here through a router that can be told to drop packets silently.

    What runs here is reached there by the addresses of SERVERS; what `command` makes of a command runs there.
    """

    SERVERS: Final = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self._router, self._client = self._hold(), self._hold()
        self._link(("s0", None), ("s1", self._router), "10.77.0")
        self._ip(None, "address", "add", f"{self.SERVERS[1]}/24", "dev", "s0")
        self._link(("c0", self._client), ("c1", self._router), "10.78.0")
        self._ip(None, "route", "add", "default", "via", "10.77.0.254")
        self._ip(self._client, "route", "add", "default", "via", "10.78.0.254")
        self._run(self._router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")

    def command(self, *command: str) -> list[str]:
        return [*_there(self._client), *command]

    @contextmanager
    def cut(self, server: str) -> Iterator[None]:
        """Every packet from and to that address is dropped, and nobody told."""
        for way in ("from", "to"):
            self._ip(self._router, "rule", "add", way, server, "priority", "1", "blackhole")
        yield
        for way in ("from", "to"):
            self._ip(self._router, "rule", "delete", way, server, "priority", "1", "blackhole")

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait(timeout=5)

    def _hold(self) -> int:
        """A network namespace with nothing in it: the id of the process that keeps it."""
        keep = "ip link set lo up && echo && exec sleep infinity"
        holder = subprocess.Popen(["unshare", "--net", "sh", "-c", keep], stdout=subprocess.PIPE)
        self._holders.append(holder)
        assert holder.stdout
        assert holder.stdout.readline()
        holder.stdout.close()
        return holder.pid

    def _link(self, one: tuple[str, int | None], router: tuple[str, int | None], net: str) -> None:
        self._ip(None, "link", "add", one[0], "type", "veth", "peer", "name", router[0])
        for (name, place), address in ((one, 1), (router, 254)):
            if place:
                self._ip(None, "link", "set", name, "netns", str(place))
            self._ip(place, "address", "add", f"{net}.{address}/24", "dev", name)
            self._ip(place, "link", "set", name, "up")

    def _ip(self, place: int | None, *words: str) -> None:
        self._run(place, "ip", *words)

    def _run(self, place: int | None, *command: str) -> None:
        subprocess.run([*(_there(place) if place else []), *command], check=True)


def _there(place: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{place}/ns/net"]
