"""A real S3 server on this machine: SeaweedFS, in one process, from its wheel."""

import os
import signal
import subprocess
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

from evalstore.local import processes
from evalstore.local.servers import Server, ServerState, free_port

_OTHER_PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
    *("s3.port.grpc", "admin.port", "admin.port.grpc"),
)


class SeaweedFS(Server):
    """Like those of `evalstore up`; `bucket` is there when it serves. It checks signatures, checksums and conditions."""

    name = "SeaweedFS"
    stop_signal = signal.SIGTERM
    defaults: ClassVar = {
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "bucket": "evalstore",
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "webdav": "false",
        "admin.ui": "false",
        "master.telemetry": "false",
    }
    bucket = "evalstore"
    access_key = "evalstore"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The credentials, as boto3 finds them."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.password,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, **options: Any) -> Any:
        """A plain boto3 client."""
        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.password, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys, **options)

    def kill(self) -> None:
        """Its sockets, which it puts into /tmp whatever it is told, go with it."""
        super().kill()
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108
                left.unlink(missing_ok=True)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data.mkdir(mode=0o700, exist_ok=True)
        ports: dict[int, str] = {self.port: "s3.port"}
        for name in _OTHER_PORTS:
            while (port := free_port()) in ports:
                pass
            ports[port] = name
        self._ports = list(ports)
        options = {**self.settings, **{name: str(port) for port, name in ports.items()}, "dir": str(self.data)}
        options |= {f"{part}.localSocket": f"{self.folder}/{part}.sock" for part in ("filer", "s3")}
        weed = Path(sysconfig.get_path("scripts"), "weed")
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            return processes.start(
                [weed, "mini", *(f"-{name}={value}" for name, value in options.items())],
                mark=self.data,
                output=log,
                stop_signal=self.stop_signal,
                grace_s=self.grace_s,
                cwd=self.folder,
                env={**os.environ, **self.environment, "TMPDIR": str(self.folder)},
            )

    def _probe(self) -> ServerState:
        try:
            self.client(config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1})).head_bucket(
                Bucket=self.bucket
            )
        except (BotoCoreError, ClientError):
            return "silent"
        return "ready"
