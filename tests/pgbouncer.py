"""PgBouncer, the pooler, as a process of a test's own."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from evalstore.local import processes
from evalstore.local.servers import free_port
from tests.polling import looks

_FETCHED: Final = Path(__file__).parents[1] / ".tools/pgbouncer"
_INI: Final = """
[databases]
* = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {pool_size}
{more}
"""


def program() -> Path | None:
    """PgBouncer where `.ci/run` puts it, or where it is installed."""
    installed = shutil.which("pgbouncer")
    return next((one for one in (_FETCHED / "pgbouncer", Path(installed or "/nonexistent")) if one.exists()), None)


class PgBouncer:
    """It listens once it is made. It refuses start-up `options`, as it does by itself. `folder` may be entered by any user."""

    def __init__(self, folder: Path, url: str, *, mode: str = "transaction", pool_size: int = 2, more: str = "") -> None:
        found = program()
        assert found is not None
        parts = {name: str(value) for name, value in conninfo_to_dict(url).items()}
        self._url, self.port = parts, free_port()
        shutil.copytree(found.parent, folder / "bin") if found.parent == _FETCHED else None
        binary = folder / "bin/pgbouncer" if found.parent == _FETCHED else found
        ini = folder / "pgbouncer.ini"
        server = {name: parts[name] for name in ("host", "port", "user", "password")}
        ini.write_text(_INI.format(**server, listen_port=self.port, mode=mode, pool_size=pool_size, more=more))
        self.log = folder / "pgbouncer.log"
        with self.log.open("wb") as log:
            self._guard: subprocess.Popen[bytes] = processes.start(
                [binary, ini],
                mark=folder,
                output=log,
                identity="nobody" if os.geteuid() == 0 else "self",  # it refuses to run as root
                env={"LD_LIBRARY_PATH": str(folder / "bin")},
            )
        assert any(self._answers() for _ in looks(10)), self.log.read_text()

    @property
    def url(self) -> str:
        """The address through it."""
        return f"postgresql://{self._url['user']}:x@127.0.0.1:{self.port}/{self._url['dbname']}"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """End it."""
        self._guard.terminate()
        self._guard.wait()
