"""What `make bench` times: bare loops in processes of their own, and whole commands, with their peak memory."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO

import soundfile
import soxr

from tests.tools.corpus import MANIFEST, SAMPLE_RATE, read_manifest

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "data/bench"
OUT, LOG = WORK / "out", WORK / "last.log"
WATCH_SEC = 0.05

Loop = Callable[[Sequence[Path]], float]


def bare_copy(clips: Sequence[Path], dtype: str) -> float:
    with scratch_file() as copy:
        start = time.perf_counter()
        for path in clips:
            with open(path, "rb") as file:
                data = file.read()
            hashlib.md5(data, usedforsecurity=False).hexdigest()
            soundfile.read(io.BytesIO(data), dtype=dtype)
            copy.write(data)
        return time.perf_counter() - start


def bare_resample(clips: Sequence[Path]) -> float:
    with scratch_file() as copy:
        start = time.perf_counter()
        for path in clips:
            waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
            mono = soxr.resample(waveform.mean(axis=1), rate, SAMPLE_RATE, quality="HQ")
            flac = io.BytesIO()  # quicker than a file for each
            soundfile.write(flac, mono, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            copy.write(flac.getbuffer())
        return time.perf_counter() - start


def scratch_file() -> IO[bytes]:
    """A file that is gone once it is closed."""
    path = WORK / f"copy-{os.getpid()}"
    file = open(path, "wb")  # noqa: SIM115
    path.unlink()
    return file


def run_loops(loop: Loop, clips: Sequence[Path], count: int) -> float:
    """Seconds of the slowest of `count` loops at once, each with its share of the clips and no start-up."""
    os.sync()
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        return max(pool.map(loop, [clips[part::count] for part in range(count)]))


def run_build(corpus: Path, workers: int, peaks: dict[int, int] | None = None) -> float:
    command = ["-m", "sharding", "build", str(corpus), "--out", str(OUT), "--workers", str(workers)]
    return run_command(command, corpus, peaks)


def run_lhotse(corpus: Path, workers: int) -> float:
    return run_command(["-m", "tests.benchmarks.lhotse", str(corpus), str(OUT), str(workers)], corpus)


def speak_demo() -> Path:
    """One of the demo's corpora, for a machine that has no other speech."""
    demo = WORK / "demo"
    if not (demo / "hillside" / MANIFEST).exists():
        subprocess.run([sys.executable, "-m", "sharding", "demo-corpus", str(demo)], cwd=ROOT, check=True)
    return demo / "hillside"


def run_command(arguments: Sequence[str], corpus: Path, peaks: dict[int, int] | None = None) -> float:
    """Wall of a whole command, s; the tars that it leaves must hold every clip."""
    shutil.rmtree(OUT, ignore_errors=True)
    os.sync()  # else it would wait for what an earlier run left to be written
    with open(LOG, "wb") as log:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        if peaks is not None:
            threading.Thread(target=watch_memory, args=(process.pid, peaks), daemon=True).start()
        code = process.wait()
        seconds = time.perf_counter() - start
    if code:
        sys.exit(f"error: {' '.join(arguments)} failed; the end of {LOG}:\n{read_text(LOG)[-2000:]}")
    found, wanted = sum(map(count_clips, OUT.rglob("*.tar"))), count_rows(corpus)
    if found != wanted:
        sys.exit(f"error: {' '.join(arguments)} wrote {found:,} of {wanted:,} clips, so its time says nothing")
    shutil.rmtree(OUT)
    return seconds


def watch_memory(parent: int, peaks: dict[int, int]) -> None:
    """Note the resident peak, in bytes, of a process and then of its children, until it ends."""
    while Path(f"/proc/{parent}").exists():
        with contextlib.suppress(FileNotFoundError):  # of a process that ends between two looks
            tasks = list(Path(f"/proc/{parent}/task").glob("*/children"))
            for pid in [parent, *(int(child) for task in tasks for child in read_text(task).split())]:
                peaks[pid] = max(peaks.get(pid, 0), resident_peak(read_text(Path(f"/proc/{pid}/status"))))
        time.sleep(WATCH_SEC)


def resident_peak(status: str) -> int:
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def warm(corpus: Path) -> list[Path]:
    """Every clip, in the order of the rows, read once so that the page cache holds it."""
    clips = [corpus / row["audio_path"] for row in read_manifest(corpus)]
    for path in clips:
        path.read_bytes()
    return clips


def count_rows(corpus: Path) -> int:
    with open(corpus / MANIFEST, "rb") as lines:
        return sum(1 for _ in lines)


def count_clips(path: Path) -> int:
    with tarfile.open(path, "r:") as tar:
        return sum(name.endswith(".flac") for name in tar.getnames())


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:  # a process that has just ended
        return ""
