"""`python -m streamtrain`: forecast a run, look at one, transcribe, score, export, package."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.command import JSONL, PNG, ZIP, ZSTANDARD, Commands, folder, number, out_file, out_folder, place
from sharding.errors import StreamtrainError
from sharding.files.writing import file_to_replace

# Imports stay inside the commands: `score` starts without torch, and the others tell a wrong path without it.

BEAM = 16  # prefixes, where a beam is needed and none is given


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("streamtrain").setLevel(logging.INFO)
    return _commands().run(arguments)


def _check_model(folder: Path) -> None:
    """Raise StreamtrainError if the folder holds no model."""
    from streamtrain.model.vocab import load_vocab

    load_vocab(folder)


def _plan(options: argparse.Namespace) -> int:
    from streamtrain.data.plan_report import Cluster, plot, render, report_plan, write_keys, write_schedule

    machines = Cluster(options.world_size, options.ranks_per_node, options.speed)
    prediction = report_plan(options.shards, options.config, options.set, machines, options.epoch)
    for write, out in ((write_keys, options.keys), (write_schedule, options.shard_schedule), (plot, options.plot)):
        if out:
            write(prediction, out)
    print(json.dumps(prediction.summary, indent=1) if options.json else render(prediction.summary, machines))
    return 0


def _summary(options: argparse.Namespace) -> int:
    from streamtrain.run_status import check_mirrored, read_result
    from streamtrain.training.run_log import render_run

    run = Path(options.run_dir)
    print(render_run(run))
    check_mirrored(run, read_result(run))
    return 0


def _transcribe(options: argparse.Namespace) -> int:
    beam = options.beam or (max(BEAM, options.nbest) if options.nbest else 0)
    if beam < options.nbest:
        raise StreamtrainError(f"--beam {beam} holds no {options.nbest} alternatives", "widen it, or leave it out")
    log_probs = Path(options.log_probs) if options.log_probs else None
    _check_model(options.model)
    from sharding.sources.manifest import parse_columns
    from streamtrain.infer.inputs import find_recordings

    recordings = find_recordings(options.source, options.audio_root, parse_columns(options.columns))

    from streamtrain.infer.transcribe import DecodingOptions, transcribe

    reading = DecodingOptions(options.batch_seconds, beam, options.nbest, log_probs)
    return 1 if transcribe(options.model, recordings, options.out, reading) else 0


def _align(options: argparse.Namespace) -> int:
    _check_model(options.model)
    from sharding.shardset.index import read_index_header
    from sharding.shardset.store import open_store

    read_index_header(open_store(options.shards))

    from streamtrain.infer.align import align_shards

    count = align_shards(options.model, options.shards, options.out, options.batch_seconds)
    print(f"{options.out}: {count:,} labelled recordings")
    return 0


def _score(options: argparse.Namespace) -> int:
    from streamtrain.eval.score import render, score_files

    result = score_files(Path(options.predicted), Path(options.actual))
    print(json.dumps(result) if options.json else render(result))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from streamtrain.eval.compare import compare_folders, render, to_json

    comparison = compare_folders(Path(options.before), Path(options.after))
    print(to_json(comparison) if options.json else render(comparison))
    return 0


def _export(options: argparse.Namespace) -> int:
    _check_model(options.model)

    from streamtrain.infer.export import export_model

    difference = export_model(options.model, Path(options.out))
    print(f"{options.out}: written; Transformers computes the same from it (largest difference {difference:.1e})")
    return 0


def _package(options: argparse.Namespace) -> int:
    out: Path = options.out
    if options.check is not None and file_to_replace(out) is None:
        raise StreamtrainError(f"{out}: --check reads the zip again", "name a file, or leave --check out")
    _check_model(options.model)

    from streamtrain.submission.package import package, rehearse, render

    track = package(options.model, out, options.batch_seconds)
    size = f", {out.stat().st_size / 2**20:,.1f} MB" if out.is_file() else ""
    print(f"{out}: written{size}, {track} track")
    if options.check is not None:
        print(render(rehearse(out, options.check or None, options.python), track))
    return 0


def _commands() -> Commands:
    commands = Commands("python -m streamtrain", __doc__)
    plan = commands.add(
        "plan",
        _plan,
        "Forecast a run from the index alone: steps, padding, rank idle, valid world sizes.",
        "planning epoch {epoch} of {config}",
    )
    plan.add_argument(
        "shards", type=place, nargs="?", help="folder or URL of a shard set (default: the configuration's)"
    )
    plan.add_argument("--config", type=place, default="configs/zero2.json", help="default: %(default)s")
    plan.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE",
        help="override settings of the configuration")  # fmt: skip
    plan.add_argument("--world-size", type=int, default=1, help="ranks (default: %(default)s)")
    plan.add_argument("--ranks-per-node", type=number(1, kind=int), default=8,
        help="ranks of a machine, which share its cache (default: %(default)s)")  # fmt: skip
    plan.add_argument("--speed", type=number(0.01), default=200.0,
        help="seconds of speech that a rank trains on in a second, as a run's log says: tells how long an epoch takes "
             "(default: %(default)s)")  # fmt: skip
    plan.add_argument("--epoch", type=int, default=0, help="which epoch to plan (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--plot", type=out_file(PNG), metavar="FILE",
        help="draw how even the steps are, what a cache must hold, and when which shard is needed, as PNG")  # fmt: skip
    plan.add_argument("--keys", type=out_file(JSONL), metavar="FILE",
        help="write JSONL: step, micro_batch, rank and keys of each micro-batch")  # fmt: skip
    plan.add_argument("--shard-schedule", type=out_file(JSONL), metavar="FILE",
        help="write JSONL: node, shard, and the first and the last step at which it is needed")  # fmt: skip

    summary = commands.add(
        "summary",
        _summary,
        "Show what a run has reached and where its files are; fails if it has not finished.",
        "reading {run_dir}",
    )
    summary.add_argument("run_dir", type=place, help="the run's folder, such as runs/zero2")

    transcribe = commands.add(
        "transcribe",
        _transcribe,
        "Audio → JSONL with the text of each recording, and when its words are said.",
        "transcribing {source} with {model}, into {out}",
    )
    transcribe.add_argument("model", type=folder, help="folder of a trained model, such as RUN/best")
    transcribe.add_argument(
        "source",
        type=place,
        nargs="+",
        help="audio files, folders or zips of them, transcripts files with an audio_path, shard sets, s3://… of either",
    )
    transcribe.add_argument(
        "--out", type=out_file(JSONL), required=True,
        help="JSONL file to write, `-` for the standard output; the same command goes on where it was killed",
    )  # fmt: skip
    transcribe.add_argument("--columns", default="", metavar="FIELD=COLUMN,…",
        help="the columns of a transcripts file that has other names, as for `python -m sharding build`, such as "
             "audio_path=path,utterance_id=id")  # fmt: skip
    transcribe.add_argument("--audio-root", default="", metavar="DIR",
        help="take absolute audio paths of a transcripts file that lie below this folder, and look up relative ones in "
             "it")  # fmt: skip
    transcribe.add_argument("--batch-seconds", type=number(1),
        help="padded seconds per forward: larger takes more memory (default: 400 on a GPU; on CPU by the model, "
             "at most 30)")  # fmt: skip

    transcribe.add_argument("--beam", type=number(1, kind=int), default=0, metavar="WIDTH",
        help="sum the paths that spell the same, among so many prefixes (default: the best path)")  # fmt: skip
    transcribe.add_argument("--nbest", type=number(1, kind=int), default=0, metavar="N",
        help=f"write the N most probable texts of each too (a beam of {BEAM} where none is given)")  # fmt: skip
    transcribe.add_argument("--log-probs", type=out_folder, metavar="DIR",
        help="write log-probabilities there, to average models': NumPy, float16, (frames, symbols)")  # fmt: skip

    align = commands.add(
        "align", _align, "When the words of labelled recordings are said, by a model: word times.",
        "aligning the labels of {shards} with {model}, into {out}",
    )  # fmt: skip
    align.add_argument("model", type=folder, help="folder of a trained model, such as RUN/best")
    align.add_argument("shards", type=place, help="folder or URL of a shard set")
    align.add_argument(
        "--out", type=out_file(ZSTANDARD), required=True, help="file to write, such as alignments.jsonl.zst"
    )
    align.add_argument("--batch-seconds", type=number(1),
        help="padded seconds per forward (default: 400 on a GPU; on CPU by the model, at most 30)")  # fmt: skip

    score = commands.add(
        "score", _score, "CER or WER of a submission, as the challenge scores it.", "scoring {predicted} by {actual}"
    )
    score.add_argument(
        "predicted", type=place, help="JSONL with utterance_id and phonetic_text (CER) or orthographic_text (WER)"
    )
    score.add_argument(
        "actual", type=place, help="JSONL with utterance_id and the same field, such as a transcripts file"
    )
    score.add_argument("--json", action="store_true", help="print JSON")

    compare = commands.add(
        "compare", _compare, "Two models on the same clips: is the difference more than chance?",
        "comparing {before} with {after}",
    )  # fmt: skip
    compare.add_argument("before", type=place, help="folder with the scorecard of one model, such as a run's")
    compare.add_argument("after", type=place, help="folder with the scorecard of the other")
    compare.add_argument("--json", action="store_true", help="print JSON")

    package = commands.add(
        "package", _package, "Pack a trained model as a submission to the challenge.", "packing {model} into {out}"
    )
    package.add_argument("model", type=folder, help="folder of a trained model, such as RUN/best")
    package.add_argument(
        "--out", type=out_file(ZIP), required=True, metavar="ZIP", help="file to write, such as submission.zip"
    )
    package.add_argument("--batch-seconds", type=number(1),
        help="padded seconds of a forward there (default: 400 on a GPU, 30 elsewhere)")  # fmt: skip
    package.add_argument("--check", nargs="?", const="", metavar="DATA",
        help="rehearse it: unpacked, offline, with the runtime's packages alone; on DATA, a folder in the challenge's "
             "form or a shard set (default: on noise)")  # fmt: skip
    package.add_argument("--python", default=sys.executable,
        help="interpreter for --check, such as one of an environment with the runtime's very versions")  # fmt: skip

    export = commands.add(
        "export",
        _export,
        "Copy a trained model to a folder of its own and verify it in Transformers.",
        "copying {model} to {out}",
    )
    export.add_argument("model", type=folder, help="folder of a trained model, such as RUN/best")
    export.add_argument("--out", type=out_folder, required=True, help="folder to write")
    return commands
