"""Check what a run needs: libraries, GPUs, threads, memory, disk, the port of the ranks, buckets. Torch stays out."""

import os
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from queue import Empty, Queue
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement

from sharding.errors import StreamtrainError
from sharding.pool import available_cores
from sharding.shardset.store import open_store

MASTER_PORT = 29_500  # DeepSpeed's default
PLACE_SEC = 10.0
GIB = 2**30
INSTALL = "install this package again: pip install ."
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
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=PLACE_SEC, check=True)
    except subprocess.SubprocessError as error:  # the driver may hang
        yield Finding("gpus", f"nvidia-smi fails: {error}", fault=True)
        return
    with suppress(PackageNotFoundError):  # a fault by itself
        if version("torch").endswith("+cpu"):
            yield Finding("gpus", "there are some, but this torch is for CPUs alone: install another build", fault=True)
    for number, line in enumerate(answer.stdout.splitlines()):
        name, total, used, driver = line.split(", ")
        yield Finding("gpus", f"{number}: {name}, {used} of {total} are used, driver {driver}")


def _port() -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run may just have ended
        try:
            probe.bind(("", MASTER_PORT))
        except OSError:
            return Finding("port", f"{MASTER_PORT} is taken: under `deepspeed`, give a run another --master_port")
    return Finding("port", f"{MASTER_PORT}, at which ranks under `deepspeed` meet, is free")


def _place(place: str) -> Finding:
    """Return whether a folder or a bucket can be read, and whether it holds a shard set."""
    if "://" not in place and not os.path.isdir(place):
        return Finding("place", f"{place}: there is no such folder", fault=True)
    answer: Queue[bool | Exception] = Queue()

    def ask() -> None:
        try:
            answer.put(open_store(place).exists("index.json"))
        except (StreamtrainError, OSError) as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()  # a store retries for longer
    try:
        found = answer.get(timeout=PLACE_SEC)
    except Empty:
        return Finding("place", f"{place}: no answer within {PLACE_SEC:.0f} s", fault=True)
    if isinstance(found, Exception):
        return Finding("place", f"{place}: {str(found).splitlines()[0]}", fault=True)
    return Finding("place", f"{place}: can be read, and holds {'a' if found else 'no'} shard set")


def render(findings: Sequence[Finding]) -> str:
    """Return the report as text."""
    return "\n".join(f"{'✗' if one.fault else ' '} {one.subject:<10}{one.text}" for one in findings)
