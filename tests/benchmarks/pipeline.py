"""One way to transcribe, timed from a model's folder to the last text: `bench_pipeline MODEL CORPUS ours|SIZE`.

`SIZE` is the batch size of Transformers' pipeline, which gets its clips decoded by soundfile on the way, as ours are.
Prints the seconds. Imports are not counted, of either.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import soundfile
from transformers import pipeline

from streamtrain.infer.inputs import find_recordings
from streamtrain.infer.transcribe import transcribe


def run_ours(model: Path, corpus: Path) -> None:
    with TemporaryDirectory() as folder:
        if transcribe(model, find_recordings([str(corpus)]), Path(folder) / "out.jsonl"):
            raise SystemExit("not every clip was transcribed")


def run_pipeline(model: Path, corpus: Path, batch_size: int) -> None:
    def clips() -> Iterator[dict[str, Any]]:
        for path in sorted(corpus.rglob("*.flac")):
            waveform, rate = soundfile.read(path, dtype="float32")
            yield {"raw": waveform, "sampling_rate": rate}

    recogniser = pipeline("automatic-speech-recognition", str(model), batch_size=batch_size)
    texts = [said["text"] for said in recogniser(clips())]
    if len(texts) != len(list(corpus.rglob("*.flac"))):
        raise SystemExit("not every clip was transcribed")


def main() -> None:
    model, corpus, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    started = time.perf_counter()
    if way == "ours":
        run_ours(model, corpus)
    else:
        run_pipeline(model, corpus, int(way))
    print(f"seconds {time.perf_counter() - started}")


if __name__ == "__main__":
    main()
