"""`python -m tests.benchmarks.lhotse CORPUS OUT JOBS`: what a user of lhotse would run, for `make bench` to time."""

import os
import sys
from pathlib import Path

os.environ.setdefault("LHOTSE_AUDIO_BACKEND", "LibsndfileBackend")  # the first it would try: 5 % quicker if named

from lhotse import CutSet, RecordingSet, SupervisionSegment, SupervisionSet

from tests.tools.corpus import read_manifest

SHARD_CLIPS = 1_000  # lhotse's default


def export(corpus: Path, out: Path, jobs: int) -> None:
    """Manifests of headers and transcripts, then a Shar export."""
    rows = read_manifest(corpus)
    recordings = RecordingSet.from_dir(corpus / "audio", "*.flac")
    seconds = {recording.id: recording.duration for recording in recordings}  # the set itself looks ids up one by one
    supervisions = SupervisionSet.from_segments(
        SupervisionSegment(
            id=row["utterance_id"],
            recording_id=row["utterance_id"],
            start=0.0,
            duration=seconds[row["utterance_id"]],
            text=row["phonetic_text"],
            speaker=row["child_id"],
            custom={"session_id": row["session_id"], "age_bucket": row["age_bucket"]},
        )
        for row in rows
    )
    cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    out.mkdir(parents=True)
    shard_size = min(SHARD_CLIPS, -(-len(rows) // (4 * jobs)))  # else some jobs would stand idle
    cuts.to_shar(out, fields={"recording": "flac"}, shard_size=shard_size, num_jobs=jobs)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
