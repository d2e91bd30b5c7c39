"""A portable model: the Hugging Face layout, loaded back and compared before anyone relies on it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from sharding.errors import StreamtrainError
from streamtrain.folders import put_in_place
from streamtrain.model import load_trained, save_model
from streamtrain.network import CTCModel
from streamtrain.scorecard import render_interval
from streamtrain.vocab import load_vocab

TOLERANCE = 1e-5


class ExportError(StreamtrainError):
    """An export that does not compute what the model computes."""


def save_best(model: CTCModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write the model with these weights to `folder`, whole or not at all. Raises ExportError."""
    partial = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save_model(model, partial, weights)
        put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ExportError(f"{folder}: cannot be written: {reason}", "make room, and give the same command") from error


def export_model(source: Path, out: Path) -> float:
    """Copy a trained model to a new folder and verify that Transformers computes the same from the copy.

    Returns the largest difference of log-probabilities seen, on two seconds of noise; raises ExportError above 1e-5.
    """
    from transformers import AutoModelForCTC

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: is not an empty folder", "choose another one")
    model = load_trained(source)
    save_model(model, out, {name: value.contiguous() for name, value in model.network.state_dict().items()})
    scorecard = source.parent / "scorecard.json"
    if scorecard.is_file():
        (out / "scorecard.json").write_text(scorecard.read_text(encoding="utf-8"), encoding="utf-8")
    (out / "README.md").write_text(_model_card(source, scorecard), encoding="utf-8")
    noise = torch.randn(1, 32_000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model(noise, torch.tensor([noise.shape[1]]))
        theirs = AutoModelForCTC.from_pretrained(out).eval()(noise).logits.log_softmax(-1)
    difference = float((ours - theirs).abs().max())
    if difference > TOLERANCE:
        raise ExportError(
            f"{out}: Transformers' log-probabilities differ by {difference:.2g}, {TOLERANCE:g} is allowed"
        )
    return difference


def _model_card(source: Path, scorecard: Path) -> str:
    card = json.loads(scorecard.read_text(encoding="utf-8")) if scorecard.is_file() else None
    score = (
        f"CER {card['cer']:.4f} ({render_interval(card)}) on "
        f"{card['clips']:,} clips of {card['children']} children of split `{card['split']}`."
        if card
        else "Not scored."
    )
    speech = "phones (IPA)" if load_vocab(source).track == "phonetic" else "words"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: automatic-speech-recognition\n---\n"
        f"# {source.resolve().parent.name}\n\nA CTC recogniser of {speech}, trained with streamtrain.\n\n{score}\n"
    )
