"""Build shards of speech, train a recogniser on them, score it, use it."""

import json as json_format
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from pydantic import Field

from sharding.cli import app as sharding_app
from sharding.command import (
    JSONL,
    PNG,
    WHOLE,
    ZIP,
    ZSTANDARD,
    Folder,
    OutFolder,
    Place,
    announce,
    new_app,
    out_file,
    run,
    several,
    shortened,
)
from sharding.errors import StreamtrainError
from sharding.files.writing import file_to_replace
from sharding.labels.units import Units
from streamtrain import ranks
from streamtrain.launcher import LaunchOptions, count_ranks, is_rank, launch

# Imports stay inside the commands: each tells at once what it begins, and a wrong path before torch is imported.

BEAM = 16  # prefixes, if a beam is needed and none is given
OF_SHARDING = ("build", "verify", "inspect", "split", "index", "demo-corpus")

Beam = Annotated[int, Field(ge=0), WHOLE, Parameter(metavar="WIDTH")]
BatchSeconds = Annotated[float | None, Field(ge=1, allow_inf_nan=False)]

HERE = LaunchOptions()
TRAINING, MODELS, HELP = Group("Training", sort_key=2), Group("Models", sort_key=3), Group("Help", sort_key=4)

app = new_app("streamtrain", __doc__)
app.register_install_completion_command()
for name in OF_SHARDING:
    app.command(sharding_app[name], name=name)


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("streamtrain").setLevel(logging.INFO)
    return run(app, arguments)


@app.command(group=TRAINING, help_epilogue="Example: streamtrain plan --config zero2 --world-size 8 --plot plan.png")
def plan(
    shards: Place | None = None,
    /,
    *,
    config: Place = "zero2",
    set: Annotated[list[str], several("SECTION.KEY=VALUE")] = [],  # noqa: B006
    world_size: Annotated[int, WHOLE] = 1,
    ranks_per_node: Annotated[int, Field(ge=1), WHOLE] = 8,
    speed: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 200.0,
    epoch: Annotated[int, WHOLE] = 0,
    json: bool = False,
    plot: Annotated[Path | None, out_file(PNG)] = None,
    keys: Annotated[Path | None, out_file(JSONL)] = None,
    shard_schedule: Annotated[Path | None, out_file(JSONL)] = None,
) -> None:
    """Forecast a run from the index alone: steps, padding, rank idle, valid world sizes.

    Args:
        shards: Folder or URL of a shard set (default: that of the configuration).
        config: Name of a packaged configuration, or a JSON file.
        set: Override settings of the configuration.
        world_size: Ranks.
        ranks_per_node: Ranks of a machine, which share its cache.
        speed: Seconds of speech that a rank trains on in a second, as a run's log says: tells how long an epoch takes.
        epoch: Which epoch to plan.
        json: Print JSON.
        plot: Draw how even the steps are, what a cache must hold, and when which shard is needed, as PNG.
        keys: Write JSONL: step, micro_batch, rank and keys of each micro-batch.
        shard_schedule: Write JSONL: node, shard, and the first and the last step at which it is needed.
    """
    announce(f"planning epoch {epoch} of {config}")
    from streamtrain.data.plan_report import Cluster, render, report_plan, write_keys, write_schedule
    from streamtrain.data.plan_report import plot as draw

    machines = Cluster(world_size, ranks_per_node, speed)
    prediction = report_plan(shards, config, set, machines, epoch)
    for write, out in ((write_keys, keys), (write_schedule, shard_schedule), (draw, plot)):
        if out:
            write(prediction, out)
    print(json_format.dumps(prediction.summary, indent=1) if json else render(prediction.summary, machines))


@app.command(
    group=TRAINING,
    help_epilogue="Example: streamtrain train --config zero2 --set data.shards=s3://speech/shards train.epochs=30",
)
def train(*, options: ranks.TrainOptions, where: LaunchOptions = HERE) -> int:
    """Train on all GPUs of this machine, or of several; the same command resumes a run that was stopped."""
    count = 1 if is_rank() else count_ranks(where)
    if count == 1:
        ranks.train(options)
        return 0
    announce(f"training as {options.config} says")
    config = options.check(count)
    code = launch("train", options, where, count)
    if code == 0 and not options.find_batch_seconds:
        from streamtrain.run_status import read_result

        read_result(Path(config.train.run_dir))  # it has ended well only if it says so
    return code


@app.command(
    group=TRAINING,
    help_epilogue="Example: streamtrain evaluate --model runs/zero2/best --out runs/zero2/evaluation",
)
def evaluate(*, options: ranks.EvaluateOptions, where: LaunchOptions = HERE) -> int:
    """Score a model on each clip of a split once: CER or WER, with intervals, and a page of the worst clips."""
    count = 1 if is_rank() else count_ranks(where)
    if count == 1:
        ranks.evaluate(options)
        return 0
    announce(f"scoring {options.model} on split {options.split} of {options.shards}")
    options.check()
    return launch("evaluate", options, where, count)


@app.command(group=TRAINING, help_epilogue="Example: streamtrain summary runs/zero2")
def summary(run_dir: Place, /, *, html: bool = False) -> None:
    """Show what a run has reached and where its files are; fail if it has not finished.

    Args:
        run_dir: The run's folder, such as runs/zero2.
        html: Write report.html there too: its settings, data, curves, epochs, transcriptions, machines, wall time.
    """
    announce(f"reading {run_dir}")
    from streamtrain.run_status import check_mirrored, read_result
    from streamtrain.training.run_log import render_run

    folder = Path(run_dir)
    if html:
        from streamtrain.training.report import write_report

        print(f"{write_report(folder)}: written")
    print(render_run(folder))
    check_mirrored(folder, read_result(folder))


@app.command(
    group=MODELS, help_epilogue="Example: streamtrain transcribe runs/zero2/best recordings/ --out texts.jsonl"
)
def transcribe(
    model: Folder,
    source: Annotated[list[str], several("SOURCE")],
    /,
    *,
    out: Annotated[Path, out_file(JSONL)],
    columns: Annotated[str, Parameter(metavar="FIELD=COLUMN,…")] = "",
    audio_root: Annotated[str, Parameter(metavar="FOLDER")] = "",
    batch_seconds: BatchSeconds = None,
    beam: Beam = 0,
    nbest: Annotated[int, Field(ge=0), WHOLE] = 0,
    log_probs: OutFolder | None = None,
) -> int:
    """Write the text of each recording, and when its words are said, as JSONL.

    Args:
        model: Folder of a trained model, such as RUN/best.
        source: Audio files, folders or zips of them, transcripts files with an audio_path, shard sets, or s3://… of
            either.
        out: JSONL file to write, `-` for standard output; the same command resumes if it was killed.
        columns: The columns of a transcripts file that has other names, such as audio_path=path,utterance_id=id.
        audio_root: Take absolute audio paths of a transcripts file that lie below this folder, and look up relative
            ones in it.
        batch_seconds: Padded seconds per forward: larger takes more memory (default: 400 on a GPU; on CPU by the
            model, at most 30).
        beam: Sum the paths that spell the same, among so many prefixes; 0: the best path.
        nbest: Write the N most probable texts of each too (with a beam of 16 if none is given).
        log_probs: Write log-probabilities there, to average models': NumPy, float16, (frames, symbols).
    """
    announce(f"transcribing {shortened(source)} with {model}, into {out}")
    beam = beam or (max(BEAM, nbest) if nbest else 0)
    if beam < nbest:
        raise StreamtrainError(f"--beam {beam} holds no {nbest} alternatives", "widen it, or leave it out")
    _check_model(model)
    from sharding.sources.manifest import parse_columns
    from streamtrain.infer.inputs import find_recordings

    recordings = find_recordings(source, audio_root, parse_columns(columns))

    from streamtrain.infer.transcribe import DecodingOptions
    from streamtrain.infer.transcribe import transcribe as transcribe_all

    decoding = DecodingOptions(batch_seconds, beam, nbest, Path(log_probs) if log_probs else None)
    return 1 if transcribe_all(model, recordings, out, decoding) else 0


@app.command(
    group=MODELS, help_epilogue="Example: streamtrain align runs/zero2/best data/shards --out alignments.jsonl.zst"
)
def align(
    model: Folder, shards: Place, /, *, out: Annotated[Path, out_file(ZSTANDARD)], batch_seconds: BatchSeconds = None
) -> None:
    """Write when the words of labelled recordings are said, by a model: `build --alignments` takes it.

    Args:
        model: Folder of a trained model, such as RUN/best.
        shards: Folder or URL of a shard set.
        out: File to write, such as alignments.jsonl.zst.
        batch_seconds: Padded seconds per forward (default: 400 on a GPU; on CPU by the model, at most 30).
    """
    announce(f"aligning the labels of {shards} with {model}, into {out}")
    _check_model(model)
    from sharding.shardset.index import read_index_header
    from sharding.shardset.store import open_store

    read_index_header(open_store(shards))

    from streamtrain.infer.align import align_shards

    count = align_shards(model, shards, out, batch_seconds)
    print(f"{out}: {count:,} labelled recordings")


@app.command(group=MODELS, help_epilogue="Example: streamtrain score texts.jsonl data/raw/a/transcripts.jsonl")
def score(
    predicted: Place,
    actual: Place,
    /,
    *,
    profile: Annotated[str, Parameter(metavar="NAME")] = "",
    units: Units | None = None,
    json: bool = False,
) -> None:
    """Print the error rates of texts, as the challenge scores them: over symbols, words and characters.

    Args:
        predicted: JSONL with utterance_id and phonetic_text (CER), orthographic_text (WER) or text.
        actual: JSONL with utterance_id and the same field, such as a transcripts file.
        profile: Normal form in which they are compared, as in `build` (default: pasketti of phonetic_text, english of
            orthographic_text, text of text).
        units: Symbols of a text, as in `build`.
        json: Print JSON.
    """
    if units and not profile:
        raise StreamtrainError("--units has no effect without --profile", "give --profile too, as in `build`")
    announce(f"scoring {predicted} by {actual}")
    from sharding.labels.policy import policy_of
    from sharding.labels.profiles import allow_profile
    from streamtrain.eval.score import render, score_files

    allow_profile(profile)
    result = score_files(Path(predicted), Path(actual), policy_of(profile, units) if profile else None)
    print(json_format.dumps(result) if json else render(result))


@app.command(group=TRAINING, help_epilogue="Example: streamtrain compare runs/zero2 runs/larger")
def compare(before: Place, after: Place, /, *, json: bool = False) -> None:
    """Compare two models on the same clips: is the difference more than chance?

    Args:
        before: Folder with the scorecard of one model, such as a run's.
        after: Folder with the scorecard of the other.
        json: Print JSON.
    """
    announce(f"comparing {before} with {after}")
    from streamtrain.eval.compare import compare_folders, render, to_json

    comparison = compare_folders(Path(before), Path(after))
    print(to_json(comparison) if json else render(comparison))


@app.command(group=MODELS, help_epilogue="Example: streamtrain export runs/zero2/best --out my-model")
def export(model: Folder, /, *, out: OutFolder) -> None:
    """Copy a trained model to a folder of its own and verify it in Transformers.

    Args:
        model: Folder of a trained model, such as RUN/best.
        out: Folder to write.
    """
    announce(f"copying {model} to {out}")
    _check_model(model)

    from streamtrain.infer.export import export_model

    difference = export_model(model, Path(out))
    print(f"{out}: written; Transformers computes the same from it (largest difference {difference:.1e})")


@app.command(group=MODELS, help_epilogue="Example: streamtrain package runs/zero2/best --out submission.zip --check")
def package(
    model: Folder,
    /,
    *,
    out: Annotated[Path, out_file(ZIP)],
    batch_seconds: BatchSeconds = None,
    check: Annotated[list[str] | None, Parameter(consume_multiple=(0, 1), metavar="[DATA]")] = None,
    python: Place = sys.executable,
) -> None:
    """Pack a trained model as a submission to the challenge.

    Args:
        model: Folder of a trained model, such as RUN/best.
        out: File to write, such as submission.zip.
        batch_seconds: Padded seconds per forward there (default: 400 on a GPU; on CPU by the model, at most 30).
        check: Rehearse it: unpacked, offline, with the runtime's packages alone; on DATA, a folder in the challenge's
            form or a shard set (default: on noise).
        python: Interpreter of the rehearsal, such as one of an environment with the runtime's very versions.
    """
    announce(f"packing {model} into {out}")
    if check is not None and file_to_replace(out) is None:
        raise StreamtrainError(f"{out}: --check reads the zip again", "name a file, or leave --check out")
    _check_model(model)

    from streamtrain.submission.package import package as pack
    from streamtrain.submission.package import rehearse, render

    profile = pack(model, out, batch_seconds)
    size = f", {out.stat().st_size / 2**20:,.1f} MB" if out.is_file() else ""
    print(f"{out}: written{size}, profile {profile}")
    if check is not None:
        print(render(rehearse(out, check[0] if check else None, python), profile))


@app.command(group=HELP, help_epilogue="Example: streamtrain doctor s3://speech/shards")
def doctor(places: Annotated[list[str], several("PLACE")] = [], /) -> int:  # noqa: B006
    """Check what a run needs: libraries, GPUs, threads, memory, disk, port, buckets; fail if something is missing.

    Args:
        places: Folders or URLs of shard sets that must be reachable.
    """
    from streamtrain.doctor import examine, render

    findings = list(examine(places))
    print(render(findings))
    return int(any(finding.fault for finding in findings))


@app.command(group=HELP, help_epilogue="Example: streamtrain config zero2 --explain")
def config(
    name: Place | None = None,
    /,
    *,
    set: Annotated[list[str], several("SECTION.KEY=VALUE")] = [],  # noqa: B006
    explain: bool = False,
) -> None:
    """Print a configuration as JSON, with all defaults; without a name, list the packaged ones.

    Args:
        name: A packaged configuration, or a JSON file.
        set: Override settings.
        explain: Print the name, the value and the meaning of every key instead.
    """
    from streamtrain import config as configs

    if set and name is None:
        raise StreamtrainError("--set needs a configuration to change", "name one before it: streamtrain config zero2")
    chosen = configs.load_config(name, set) if name else None
    if explain:
        print(configs.explain(chosen))
    elif chosen:
        print(json_format.dumps(chosen.model_dump(), indent=1))
    else:
        print("\n".join(f"{key:<15}{path}" for key, path in configs.PACKAGED.items()))


def _check_model(folder: Path) -> None:
    """Raise StreamtrainError if the folder holds no model."""
    from streamtrain.model.tokenizer import load_vocab

    load_vocab(folder)
