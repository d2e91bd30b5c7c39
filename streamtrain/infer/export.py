"""Export a model in the Hugging Face layout, load it back, and compare the two before anyone relies on it."""

import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError, counted
from sharding.files.document import DocumentError, Number, Size, parse, read_document
from sharding.labels.policy import METRICS, LabelPolicy
from streamtrain.atomic import new_folder
from streamtrain.eval.scorecard import render_interval, warnings
from streamtrain.model.ctc import CTCModel
from streamtrain.model.labels import describe
from streamtrain.model.pretrained import load_trained, save_model
from streamtrain.run_status import warn_unless_finished

log = logging.getLogger("streamtrain")

TOLERANCE = 1e-5
RUN_FILES = {"scorecard.json": "scorecard.json", "curves.png": "curves.png", "config.json": "training.json",
          "trained_on.json": "trained_on.json"}  # fmt: skip
CARD_SETTINGS = frozenset(  # the settings that a model card lists, if they are set
    ["pretrained", "scratch", "dropout", "freeze_cnn", "mask_time_prob", "mask_feature_prob", "batch_seconds",
     "speed_factors", "gain_db", "micro_batches_per_step", "epochs", "max_steps", "schedule", "warmup_steps", "head_lr",
     "layer_decay", "freeze_encoder_steps", "ema_decay", "patience", "seed"]
)  # fmt: skip


class _Group(TypedDict):
    name: str
    rate: Number
    clips: Size
    interval_95: NotRequired[tuple[Number, Number] | None]  # earlier scorecards had none


class _Validation(TypedDict):
    rejected: NotRequired[Size]
    disjoint_by_speaker: NotRequired[bool]


class _Card(TypedDict):
    """Describe the fields of a scorecard that a model card uses."""

    metric: Literal["cer", "per"]
    profile: str
    units: str
    cer: Number
    wer: Number
    per: NotRequired[Number]
    interval_95: tuple[Number, Number] | None
    speakers: Size
    clips: Size
    split: str
    shards: str
    undecodable: list[Any]
    validation: _Validation
    groups: dict[str, list[_Group]]


class _Data(TypedDict):
    """Describe trained_on.json."""

    shards: str
    index: str
    clips: Size
    hours: Number
    rejected: Size


class _Training(TypedDict):
    """Describe the sections of a run's configuration."""

    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]
    deepspeed: dict[str, Any]


_CARD, _DATA, _TRAINING = TypeAdapter(_Card), TypeAdapter(_Data), TypeAdapter(_Training)


class ExportError(StreamtrainError):
    """Report an export that cannot be written or does not compute what the model computes."""


def save_best(model: CTCModel, folder: Path) -> None:
    """Write a verified model to `folder`, whole or not at all. Raises StoreError if it cannot be written."""
    with new_folder(folder, _bytes_of(model)) as partial:
        save_model(model, partial)
        difference = verify(model, partial)
    log.info("Transformers computes the same from %s/: largest difference %.1e", folder.name, difference)


def export_model(source: Path, out: Path) -> float:
    """Copy a trained model to a new folder, with a model card, and verify the copy.

    The files of its run are copied too, if present: scorecard, curves, `trained_on.json`, and the run's configuration
    as `training.json`. Returns the largest difference that `verify` measures.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: is not an empty folder", "choose another folder")
    model, run = load_trained(source), source.resolve().parent
    warn_unless_finished(source)
    with new_folder(Path(os.path.realpath(out)), _bytes_of(model)) as partial:  # a link is kept, as with files
        save_model(model, partial)
        for name, copied in RUN_FILES.items():
            if (run / name).is_file():
                shutil.copyfile(run / name, partial / copied)
        (partial / "README.md").write_text(_model_card(partial, run.name, model.labels), encoding="utf-8")
        return verify(model, partial)


def _bytes_of(model: CTCModel) -> int:
    return sum(weight.nbytes for weight in model.network.state_dict().values())


def verify(model: CTCModel, folder: Path) -> float:
    """Compare a trained model with the one that Transformers loads from the folder that it was saved to.

    The weights must be equal bit for bit. Returns the largest difference of log-probabilities on a second of noise.
    Raises ExportError if that is above 1e-5 or a weight differs.
    """
    from transformers import AutoModelForCTC

    noise = torch.randn(1, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    network = AutoModelForCTC.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model(noise, torch.tensor([noise.shape[1]]))
        log_probs = network(noise).logits.log_softmax(-1)
    difference = float((expected - log_probs).abs().max())
    if not difference <= TOLERANCE:  # also if it is NaN
        raise ExportError(
            f"{folder}: Transformers' log-probabilities differ by {difference:.2g}, at most {TOLERANCE:g} is allowed"
        )
    saved, loaded = model.network.state_dict(), network.state_dict()
    if loaded.keys() != saved.keys() or any(not torch.equal(loaded[name], saved[name]) for name in loaded):
        raise ExportError(f"{folder}: does not hold the weights that were to be saved")
    return difference


def _model_card(folder: Path, name: str, labels: LabelPolicy | None) -> str:
    """Return a model card in the Hugging Face hub's form, from the run's files in `folder`."""
    card, config = _read(folder / "scorecard.json", _CARD), _read(folder / "training.json", _TRAINING)
    data = _read(folder / "trained_on.json", _DATA)
    writes = f"It writes {describe(labels)}. " if labels else ""
    head = f"---\nlibrary_name: transformers\npipeline_tag: automatic-speech-recognition\n{_metrics(card, name)}---\n"
    about = f"# {name}\n\nA CTC recogniser, trained with streamtrain. {writes}Its input is 16 kHz, one channel.\n"
    use = (
        "```python\nfrom transformers import pipeline\n\n"
        'print(pipeline("automatic-speech-recognition", ".")("clip.flac")["text"])  # decoded by ffmpeg\n```\n'
    )
    parts = [("Use", use), ("Data", _data(data)), ("Score", _scores(card)), ("Training settings", _settings(config))]
    curves = "![curves](curves.png)\n" if (folder / "curves.png").is_file() else ""
    return "\n".join([head + about, *(f"## {title}\n\n{text}" for title, text in parts if text), curves])


def _read(path: Path, schema: TypeAdapter[Any]) -> dict[str, Any]:
    """Return the content of a run's file; {} if it is missing or of another form."""
    with suppress(OSError, DocumentError):
        return {**parse(read_document(path), schema)}
    return {}


def _metrics(card: dict[str, Any], name: str) -> str:
    if not card:
        return ""
    rates = "".join(f"    - type: {kind}\n      value: {card[kind]:.6f}\n" for kind in METRICS[card["units"]])
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
    metric = card["metric"]
    summary = f"{metric.upper()} {card[metric]:.4f} ({render_interval(card)}), WER {card['wer']:.4f}"
    lines = [f"| {'':20} | {metric.upper()} | 95 % interval | clips |", "|---|---:|---:|---:|"]
    for title, rows in card["groups"].items():
        for row in rows:
            bounds = row.get("interval_95")
            interval = f"{bounds[0]:.4f} – {bounds[1]:.4f}" if bounds else ""
            lines.append(
                f"| {title.replace('_', ' ')} {row['name']} | {row['rate']:.4f} | {interval} | {row['clips']:,} |"
            )
    head = f"{summary} on {counted(card['clips'], 'clip')} of split `{card['split']}` of `{card['shards']}`."
    return "\n".join([head, "", *lines, *(f"\n**{line}**" for line in warnings(card))]) + "\n"


def _settings(config: dict[str, Any]) -> str:
    """Return a table of the settings that decide what is learnt; the whole configuration is in training.json."""
    if not config:
        return ""
    chosen = {
        f"{section}.{key}": value
        for section in ("model", "train", "data")
        for key, value in config[section].items()
        if key in CARD_SETTINGS and value not in (None, [], 0, False)
    }
    chosen["deepspeed.optimizer"] = config["deepspeed"].get("optimizer")
    rows = [f"| `{name}` | `{json.dumps(value)}` |" for name, value in chosen.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows]) + "\n"
