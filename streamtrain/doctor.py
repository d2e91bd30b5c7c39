"""Check what a run needs: libraries, GPUs, threads, memory, disk, the port of the ranks, buckets. Torch stays out."""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement

from sharding.errors import StreamtrainError
from sharding.pool import available_cores
from sharding.shardset.store import open_store

MASTER_PORT = 29_500  # DeepSpeed's default
PLACE_SEC = 10.0
GIB = 2**30
INSTALL = "install it: pip install streamtrain"
QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader"]


class Finding(NamedTuple):
    """Hold one line of the report; a fault is something that a run needs and would not find."""

    subject: str
    text: str
    fault: bool = False


def examine(places: Sequence[str]) -> Iterator[Finding]:
    """Yield what a run would find on this machine and at these folders or buckets."""
    yield Finding("python", f"{platform.python_version()} on {platform.machine()}, {platform.platform(terse=True)}")
    yield from _libraries()
    yield from _gpus()
    memory = psutil.virtual_memory()
    threads = os.environ.get("OMP_NUM_THREADS", "the cores ÷ the ranks")
    yield Finding("cores", f"{available_cores()} may be used; threads of a rank on CPU: {threads}")
    yield Finding("memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB are free")
    for folder in ("/dev/shm", "."):
        if os.path.isdir(folder):
            yield Finding(
                "disk", f"{shutil.disk_usage(folder).free / GIB:.1f} GiB are free in {os.path.abspath(folder)}"
            )
    yield _port()
    for place in places:
        yield _place(place)


def _libraries() -> Iterator[Finding]:
    """Yield the versions of the libraries that this package requires, and those that are missing or too old."""
    try:
        required = [Requirement(text) for text in requires("streamtrain") or []]
    except PackageNotFoundError:
        yield Finding("libraries", "not checked: streamtrain is used from its folder, and is not installed")
        return
    found = []
    for one in required:
        try:
            found.append(f"{one.name} {version(one.name)}")
        except PackageNotFoundError:
            if one.marker is None:  # else it belongs to an extra
                yield Finding("libraries", f"{one.name} is missing; {INSTALL}", fault=True)
            continue
        if not one.specifier.contains(version(one.name), prereleases=True):
            yield Finding("libraries", f"{found.pop()}, {one.specifier} is needed; {INSTALL}", fault=True)
    yield Finding("libraries", ", ".join(found))


def _gpus() -> Iterator[Finding]:
    if shutil.which(QUERY[0]) is None:
        yield Finding("gpus", "no NVIDIA driver: ranks compute on the CPU, unless torch knows other devices")
        return
    told = subprocess.run(QUERY, capture_output=True, text=True, timeout=PLACE_SEC, check=False)
    if told.returncode:
        yield Finding("gpus", f"nvidia-smi fails: {(told.stdout + told.stderr).strip():.200}", fault=True)
        return
    for number, line in enumerate(told.stdout.splitlines()):
        name, total, used, driver = line.split(", ")
        yield Finding("gpus", f"{number}: {name}, {used} of {total} are used, driver {driver}")


def _port() -> Finding:
    with socket.socket() as probe:
        try:
            probe.bind(("", MASTER_PORT))
        except OSError:
            return Finding("port", f"{MASTER_PORT} is taken, maybe by another run: start this one with --master-port")
    return Finding("port", f"{MASTER_PORT} is free for the ranks to meet at")


def _place(place: str) -> Finding:
    """Return whether a folder or a bucket can be read, and whether it holds a shard set."""
    if "://" not in place and not os.path.isdir(place):
        return Finding("place", f"{place}: there is no such folder", fault=True)
    pool = ThreadPoolExecutor(1)
    try:
        found = pool.submit(lambda: open_store(place).exists("index.json")).result(PLACE_SEC)
    except TimeoutError:
        return Finding("place", f"{place}: no answer within {PLACE_SEC:.0f} s", fault=True)
    except (StreamtrainError, OSError) as error:
        return Finding("place", f"{place}: {str(error).splitlines()[0]}", fault=True)
    finally:
        pool.shutdown(wait=False)
    return Finding("place", f"{place}: can be read, and holds {'a' if found else 'no'} shard set")


def render(findings: Sequence[Finding]) -> str:
    """Return the report as text."""
    return "\n".join(f"{'✗' if one.fault else ' '} {one.subject:<10}{one.text}" for one in findings)
