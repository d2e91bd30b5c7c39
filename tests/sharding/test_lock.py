"""One build at a time: in a folder by a lock of the kernel's, in a bucket by a lease, with real processes."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import obstore
import pytest

from sharding.build import lock
from sharding.build.lock import LOCK_NAME, exclusive_build
from sharding.errors import StoreError
from sharding.files.exclusive import this_process
from sharding.shardset.object_store import BucketStore
from sharding.shardset.store import open_store
from tests.tools.commands import ROOT
from tests.tools.fault_proxy import Action, Fault, FaultProxy, fault_proxy
from tests.tools.seaweed import Seaweed

HOLD = """
import sys
from sharding.build.lock import exclusive_build
from sharding.shardset.store import open_store
with exclusive_build(open_store(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def proxy(url: str, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Stands from now on between this process and the server."""
    with fault_proxy(seaweed.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(params=["folder", "bucket"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("url") if request.param == "bucket" else tmp_path / "out")


@contextmanager
def holder(out: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds OUT until its input ends or it is killed."""
    command = [sys.executable, "-c", HOLD, out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def enter(out: str) -> None:
    with exclusive_build(open_store(out)) as lease:
        lease.check()


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process takes itself for one of another host, which cannot see who lives here."""
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")


def left_in(url: str) -> list[str]:
    return [name for name in BucketStore(url).names() if name.startswith(LOCK_NAME)]


# --- folder and bucket alike ----------------------------------------------------------------------------------------


def test_a_second_build_is_refused_and_told_who_holds_it_until_the_first_has_ended(out: str) -> None:
    with holder(out) as process:
        with pytest.raises(StoreError) as refused:
            enter(out)
        who = f"another build is running (pid {process.pid} on host {socket.gethostname()} since 20"
        assert str(refused.value).startswith(f"{out}: {who}")
        assert "\nhint: wait until it has ended, or choose another --out" in str(refused.value)
        process.communicate("", timeout=30)
        assert process.returncode == 0
    enter(out)
    assert not list(open_store(out).names())


def test_a_killed_build_no_longer_keeps_others_out(out: str) -> None:
    with holder(out) as process:
        process.kill()
        process.wait()
        enter(out)
    assert not list(open_store(out).names())


def test_a_build_that_fails_gives_its_place_back(out: str) -> None:
    def fail() -> None:
        with exclusive_build(open_store(out)):
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        fail()
    enter(out)


def test_of_many_that_come_and_go_never_two_are_in(out: str, tmp_path: Path) -> None:
    rounds, inside, entered = (200 if "://" not in out else 8), tmp_path / "inside", []

    def run() -> None:
        for _ in range(rounds):
            with suppress(StoreError), exclusive_build(open_store(out)) as lease:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is in
                lease.check()
                entered.append(1)
                inside.unlink()

    failed: list[object] = []
    before, threading.excepthook = threading.excepthook, failed.append
    try:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        threading.excepthook = before
    assert not failed
    assert entered
    assert not list(open_store(out).names())


# --- a folder -------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory\nhint: name a path that can be written") as refused:
        enter(str(tmp_path / "file" / "out"))
    assert str(refused.value).startswith(f"{tmp_path / 'file' / 'out'}: ")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root writes everywhere")
    with pytest.raises(StoreError, match=f"{tmp_path}: Permission denied\nhint: name a path that you may write to"):
        enter(str(tmp_path))


def test_a_lock_that_somebody_removed_is_noticed(tmp_path: Path) -> None:
    with exclusive_build(open_store(tmp_path)) as first:
        (tmp_path / LOCK_NAME).unlink()
        with exclusive_build(open_store(tmp_path)) as second:
            second.check()
            with pytest.raises(StoreError, match="was removed during this build"):
                first.check()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_the_build_before_removes_while_it_is_being_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def flock(file: BinaryIO, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_build(open_store(tmp_path)) as lease:
        lease.check()
        with pytest.raises(StoreError, match="another build is running"):
            enter(str(tmp_path))
    assert len(calls) == 3


def test_the_lock_of_another_is_not_removed(tmp_path: Path) -> None:
    first = exclusive_build(open_store(tmp_path))
    first.__enter__()
    (tmp_path / LOCK_NAME).unlink()
    with exclusive_build(open_store(tmp_path)) as second:
        first.__exit__(None, None, None)
        second.check()


# --- a bucket -------------------------------------------------------------------------------------------------------


def test_a_lease_of_another_host_holds_while_it_is_renewed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SEC", 0.3)
    monkeypatch.setattr(lock, "EXPIRY_SEC", 2.0)
    with exclusive_build(open_store(url)) as lease:
        elsewhere(monkeypatch)
        for _ in range(5):
            with pytest.raises(StoreError, match=r"last seen [0-2] s ago"):
                enter(url)
            time.sleep(1)
        lease.check()
        assert left_in(url) == [LOCK_NAME]
    assert not left_in(url)


def test_a_lease_of_another_host_is_taken_over_once_it_is_silent(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "EXPIRY_SEC", 2.0)
    with exclusive_build(open_store(url)) as first:
        elsewhere(monkeypatch)
        time.sleep(3.5)
        with exclusive_build(open_store(url)) as second:
            second.check()
            with pytest.raises(StoreError, match=r"this build lost its lock: now held by .* on host elsewhere"):
                first.check()
    assert not left_in(url)


def test_the_lease_of_another_is_not_removed(url: str) -> None:
    theirs = json.dumps({"token": "theirs", "pid": 7, "host": "far", "since": "noon"}).encode()
    with exclusive_build(open_store(url)) as lease:
        obstore.put(BucketStore(url)._store, LOCK_NAME, theirs)
        for _ in range(2):
            with pytest.raises(StoreError, match="now held by pid 7 on host far since noon"):
                lease.check()
    assert BucketStore(url).read(LOCK_NAME) == theirs


def test_a_lease_that_somebody_removed_is_noticed(url: str) -> None:
    with exclusive_build(open_store(url)) as lease:
        BucketStore(url).delete(LOCK_NAME)
        with pytest.raises(StoreError, match="lost its lock: it was removed"):
            lease.check()
    assert not left_in(url)


def test_a_later_process_with_the_number_of_a_dead_one_is_told_from_it(url: str) -> None:
    dead = this_process() | {"started": 1}
    BucketStore(url).write(LOCK_NAME, json.dumps(dead).encode())
    enter(url)


def test_what_is_no_lease_counts_as_one_until_it_is_old(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "EXPIRY_SEC", 1.0)
    BucketStore(url).write(LOCK_NAME, b"[]")
    with pytest.raises(StoreError, match=r"another build is running \(pid \? on host \? since \?, last seen"):
        enter(url)
    time.sleep(2.5)
    enter(url)


def test_of_many_that_would_take_over_one_does(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for round_ in range(5):
        dead = this_process() | {"started": 1, "round": round_}
        BucketStore(url).write(LOCK_NAME, json.dumps(dead).encode())
        start, end, entered = threading.Barrier(6), threading.Barrier(6), []

        def run(start: threading.Barrier = start, end: threading.Barrier = end, entered: list[int] = entered) -> None:
            start.wait()
            try:
                with exclusive_build(open_store(url)) as lease:
                    entered.append(1)
                    end.wait()
                    lease.check()
            except StoreError:
                end.wait()

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(entered) == 1


@pytest.mark.parametrize("action", ["lose response", "reset", "503"])
def test_a_lease_outlives_what_gets_lost_on_the_way(
    action: Action, url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_SEC", 0.2)
    proxy.plan(Fault(action, r"(PUT|GET) .*\.building", times=3))
    with exclusive_build(open_store(url)) as lease:
        for _ in range(4):
            proxy.plan(Fault(action, r"(PUT|GET) .*\.building"))
            time.sleep(0.3)
            lease.check()
    assert proxy.count(r"PUT .*\.building", 200) > 5
    assert not left_in(url)


def test_a_server_that_is_away_is_told(url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SEC", 2.0)
    monkeypatch.setattr(lock, "RENEW_SEC", 0.2)
    with exclusive_build(open_store(url)) as lease:
        proxy.down()
        with pytest.raises(StoreError, match=rf"{url}/\.building: "):
            lease.check()
    with pytest.raises(StoreError, match=rf"{url}/\.building: "):
        enter(url)
    proxy.up()
    with pytest.raises(StoreError, match="another build is running"):
        enter(url)  # what could not be given back is there, and its process lives


def test_a_stalled_renewal_does_not_hold_up_the_build(
    url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_SEC", 0.2)
    with exclusive_build(open_store(url)):
        proxy.plan(Fault("stall", r"PUT .*\.building", seconds=2))
        ends = time.monotonic() + 2
        longest, last = 0.0, time.monotonic()
        while last < ends:
            time.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < 1


DELETED = (
    b'<DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Deleted><Key>k</Key></Deleted></DeleteResult>'
)


class Plain(BaseHTTPRequestHandler):
    """A server of objects that has never heard of conditions, and says so or ignores them."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    says_so: bool

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.says_so and ("If-None-Match" in self.headers or "If-Match" in self.headers):
            return self.answer(501)
        self.objects[self.path] = data
        return self.answer(200)

    def do_GET(self) -> None:
        data = self.objects.get(self.path)
        self.answer(404 if data is None else 200, data or b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.objects.clear()
        self.answer(200, DELETED)

    def answer(self, status: int, data: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string())
        self.send_header("ETag", '"x"')
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quietly."""


@pytest.mark.parametrize("says_so", [True, False])
def test_without_conditional_writes_a_build_goes_on_and_says_that_it_is_unguarded(
    says_so: bool, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SEC", 2.0)
    handler = type("Handler", (Plain,), {"objects": {}, "says_so": says_so})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with exclusive_build(open_store(url)) as lease:
            lease.check()
        server.shutdown()
    assert capsys.readouterr().err == f"{url}: no conditional writes here: make sure that no other build runs\n"
    assert not handler.objects  # type: ignore[attr-defined]
