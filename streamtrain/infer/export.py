"""A portable model: the Hugging Face layout, loaded back and compared before anyone relies on it."""

import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError, counted
from sharding.files.document import DocumentError, Number, Size, parse, read_document
from streamtrain.atomic import new_folder
from streamtrain.eval.scorecard import render_interval, warnings
from streamtrain.model.ctc import CTCModel
from streamtrain.model.pretrained import load_trained, save_model
from streamtrain.run_status import warn_unless_finished

log = logging.getLogger("streamtrain")

TOLERANCE = 1e-5
RUN_FILES = {"scorecard.json": "scorecard.json", "curves.png": "curves.png", "config.json": "training.json",
          "trained_on.json": "trained_on.json"}  # fmt: skip
RECIPE = frozenset(  # the settings that a model card shows, where they are set
    ["pretrained", "scratch", "dropout", "freeze_cnn", "mask_time_prob", "mask_feature_prob", "batch_seconds",
     "speed_factors", "gain_db", "micro_batches_per_step", "epochs", "max_steps", "schedule", "warmup_steps", "head_lr",
     "layer_decay", "freeze_encoder_steps", "ema_decay", "patience", "seed"]
)  # fmt: skip


class _Group(TypedDict):
    name: str
    cer: Number
    clips: Size
    interval_95: NotRequired[tuple[Number, Number] | None]  # earlier scorecards had none


class _Card(TypedDict):
    """What a model card tells of a scorecard."""

    cer: Number
    cer_interval_95: tuple[Number, Number] | None
    wer: NotRequired[Number]
    children: Size
    clips: Size
    split: str
    shards: str
    undecodable: list[Any]
    validation: dict[str, Any]
    groups: dict[str, list[_Group]]


class _Data(TypedDict):
    """trained_on.json as it is written."""

    shards: str
    index: str
    clips: Size
    hours: Number
    rejected: Size


class _Training(TypedDict):
    """The sections of a run's configuration."""

    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]
    deepspeed: dict[str, Any]


_CARD, _DATA, _TRAINING = TypeAdapter(_Card), TypeAdapter(_Data), TypeAdapter(_Training)


class ExportError(StreamtrainError):
    """An export that does not compute what the model computes."""


def save_best(model: CTCModel, folder: Path) -> None:
    """Write a model to `folder`, verified, whole or not at all. Raise StoreError if it cannot be written."""
    with new_folder(folder, _bytes_of(model)) as partial:
        save_model(model, partial)
        difference = verify(model, partial)
    log.info("Transformers computes the same from %s/: largest difference %.1e", folder.name, difference)


def export_model(source: Path, out: Path) -> float:
    """Copy a trained model to a new folder, with a model card, and verify the copy.

    What lies beside the model in its run's folder goes along: scorecard, curves, and the run's configuration as
    `training.json`. Returns what `verify` does.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: is not an empty folder", "choose another one")
    model, run = load_trained(source), source.resolve().parent
    warn_unless_finished(source)
    with new_folder(Path(os.path.realpath(out)), _bytes_of(model)) as partial:  # a link stays, as with files
        save_model(model, partial)
        for name, copied in RUN_FILES.items():
            if (run / name).is_file():
                shutil.copyfile(run / name, partial / copied)
        (partial / "README.md").write_text(_model_card(partial, run.name, model.vocab.track), encoding="utf-8")
        return verify(model, partial)


def _bytes_of(model: CTCModel) -> int:
    return sum(weight.nbytes for weight in model.network.state_dict().values())


def verify(model: CTCModel, folder: Path) -> float:
    """Hold a model, as it was trained, against what Transformers makes of the folder that it was saved to.

    The weights must be the same, bit for bit. Returns the largest difference of log-probabilities seen, on a second of
    noise. Raises ExportError if that is above 1e-5, or another weight was read.
    """
    from transformers import AutoModelForCTC

    noise = torch.randn(1, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    network = AutoModelForCTC.from_pretrained(folder).eval()
    with torch.inference_mode():
        ours = model(noise, torch.tensor([noise.shape[1]]))
        theirs = network(noise).logits.log_softmax(-1)
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:  # or it is not a number
        raise ExportError(
            f"{folder}: Transformers' log-probabilities differ by {difference:.2g}, {TOLERANCE:g} is allowed"
        )
    wanted, seen = model.network.state_dict(), network.state_dict()
    if seen.keys() != wanted.keys() or any(not torch.equal(seen[name], wanted[name]) for name in seen):
        raise ExportError(f"{folder}: does not hold the weights that were to be saved")
    return difference


def _model_card(folder: Path, name: str, track: str) -> str:
    """In the form of the Hugging Face hub; what is known of the model lies in `folder`."""
    card, config = _read(folder / "scorecard.json", _CARD), _read(folder / "training.json", _TRAINING)
    data = _read(folder / "trained_on.json", _DATA)
    speech = "phones (IPA)" if track == "phonetic" else "words, in letters"
    head = f"---\nlibrary_name: transformers\npipeline_tag: automatic-speech-recognition\n{_metrics(card, name)}---\n"
    about = f"# {name}\n\nA CTC recogniser of {speech}, trained with streamtrain. It hears 16 kHz, one channel.\n"
    use = (
        "```python\nfrom transformers import pipeline\n\n"
        'print(pipeline("automatic-speech-recognition", ".")("clip.flac")["text"])  # decoded by ffmpeg\n```\n'
    )
    parts = [("Use", use), ("Data", _data(data)), ("Score", _scores(card)), ("Recipe", _recipe(config))]
    curves = "![curves](curves.png)\n" if (folder / "curves.png").is_file() else ""
    return "\n".join([head + about, *(f"## {title}\n\n{text}" for title, text in parts if text), curves])


def _read(path: Path, wanted: TypeAdapter[Any]) -> dict[str, Any]:
    """What a run has left there; nothing where it is not there, or something else of that name."""
    with suppress(OSError, DocumentError):
        return {**parse(read_document(path), wanted)}
    return {}


def _metrics(card: dict[str, Any], name: str) -> str:
    if not card:
        return ""
    rates = "".join(f"    - type: {kind}\n      value: {card[kind]:.6f}\n" for kind in ("cer", "wer") if kind in card)
    return (
        f"model-index:\n- name: {name}\n  results:\n  - task:\n      type: automatic-speech-recognition\n"
        f"    dataset:\n      name: {json.dumps(card['shards'])}\n      type: streamtrain\n"
        f"      split: {card['split']}\n    metrics:\n{rates}"
    )


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    return (
        f"Trained on {counted(data['clips'], 'clip')}, {_time(data['hours'])}, of `{data['shards']}` (index "
        f"{data['index']}). {counted(data['rejected'], 'validation clip')} could not be read when that set was built.\n"
    )


def _time(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _scores(card: dict[str, Any]) -> str:
    if not card:
        return "Not scored.\n"
    said = f"CER {card['cer']:.4f} ({render_interval(card)})"
    said += f", WER {card['wer']:.4f}" if "wer" in card else ""
    lines = [f"| {'':20} | CER | 95 % interval | clips |", "|---|---:|---:|---:|"]
    for title, rows in card["groups"].items():
        for row in rows:
            low_high = row.get("interval_95")
            interval = f"{low_high[0]:.4f} – {low_high[1]:.4f}" if low_high else ""
            lines.append(
                f"| {title.replace('_', ' ')} {row['name']} | {row['cer']:.4f} | {interval} | {row['clips']:,} |"
            )
    head = f"{said} on {counted(card['clips'], 'clip')} of split `{card['split']}` of `{card['shards']}`."
    return "\n".join([head, "", *lines, *(f"\n**{line}**" for line in warnings(card))]) + "\n"


def _recipe(config: dict[str, Any]) -> str:
    """The settings that decide what is learnt; the whole configuration lies in training.json."""
    if not config:
        return ""
    chosen = {
        f"{section}.{key}": value
        for section in ("model", "train", "data")
        for key, value in config[section].items()
        if key in RECIPE and value not in (None, [], 0, False)
    }
    chosen["deepspeed.optimizer"] = config["deepspeed"].get("optimizer")
    rows = [f"| `{name}` | `{json.dumps(value)}` |" for name, value in chosen.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows]) + "\n"
