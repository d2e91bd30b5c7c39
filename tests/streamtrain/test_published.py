"""Models as they are published, in names and files of their time, are trained, scored, saved and exported."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC, pipeline

from streamtrain.config import ModelConfig
from streamtrain.infer.export import ExportError, export_model, save_best
from streamtrain.model.pretrained import ModelError, load_model, load_trained
from streamtrain.model.vocab import SPACE, vocab_of
from tests.tools.ports import free_port
from tests.tools.published import CLASSES, LETTERS_960H, publish, write
from tests.tools.training_runs import ROOT, losses, run, training

KINDS = list(product(CLASSES, (False, True), ("bin", "safetensors")))
RUN_OFTEN = {("wav2vec2", False, "bin"), ("hubert", True, "safetensors")}  # from start to end, the others in `test-all`


def publish_kind(folder: Path, family: str, fine_tuned: bool, file: str) -> Path:
    """Write a checkpoint; those in safetensors have weights in fp16."""
    dtype = torch.float16 if file == "safetensors" else torch.float32
    return publish(folder, family, fine_tuned, file, dtype)


def settings_of(model: Path, fine_tuned: bool) -> list[str]:
    return [f"model.pretrained={model}", *(["model.vocab=new"] if fine_tuned else [])]


@pytest.mark.parametrize(("family", "fine_tuned", "file"), KINDS)
def test_a_published_model_is_loaded_whole_and_saved_in_todays_names(
    family: str, fine_tuned: bool, file: str, tmp_path: Path
) -> None:
    source = publish_kind(tmp_path / "model", family, fine_tuned, file)
    model = load_model(ModelConfig(pretrained=str(source), vocab="new" if fine_tuned else "auto"))
    assert model.vocab == vocab_of(PHONES)
    assert model.normalize
    theirs = AutoModelForCTC.from_pretrained(source, dtype=torch.float32).state_dict()
    ours = {name: weight.contiguous() for name, weight in model.network.state_dict().items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("lm_head."))
    save_best(model.eval(), tmp_path / "best")
    saved = load_file(tmp_path / "best" / "model.safetensors")
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in ours)
    assert export_model(tmp_path / "best", tmp_path / "export") <= 1e-5


@pytest.mark.parametrize(
    ("family", "fine_tuned", "file"),
    [pytest.param(*kind, marks=() if kind in RUN_OFTEN else pytest.mark.long) for kind in KINDS],
)
def test_a_published_model_goes_from_training_to_the_pipeline(
    family: str, fine_tuned: bool, file: str, work: Path, tmp_path: Path
) -> None:
    settings = settings_of(publish_kind(tmp_path / "model", family, fine_tuned, file), fine_tuned)
    folder = tmp_path / "run"
    settings += [f"train.run_dir={folder}", "eval.every_steps=2"]
    run(training(work, "unused", *settings, "train.max_steps=2", ranks=1))
    run([sys.executable, "launch/evaluate.py", "--model", folder / "best", "--shards", work / "shards",
         "--out", tmp_path / "evaluation"])  # fmt: skip
    scores = [json.loads((each / "scorecard.json").read_text())["cer"] for each in (folder, tmp_path / "evaluation")]
    assert scores[0] == scores[1]
    done = run([*training(work, "unused", *settings, "train.max_steps=3", ranks=1), "--replan"])
    assert "resumed at step 2" in done.stderr
    assert len(losses(folder)) == 3
    run([sys.executable, "-m", "streamtrain", "export", folder / "best", "--out", tmp_path / "export"])
    clip = next(iter((work / "raw" / "tiny" / "audio").glob("*.flac")))
    waveform, _ = soundfile.read(clip, dtype="float32")
    assert isinstance(pipeline("automatic-speech-recognition", str(tmp_path / "export"))(waveform)["text"], str)


def test_the_real_configuration_trains_wav2vec2_base_to_its_end(work: Path, tmp_path: Path) -> None:
    """All its settings but the model's name, on two ranks, in a folder laid out as the manual says."""
    model = publish(tmp_path / "wav2vec2-base", "wav2vec2", fine_tuned=False, file="bin")
    (tmp_path / "data").symlink_to(work)
    command = ["deepspeed", "--num_accelerators", 2, "--master_port", free_port(), ROOT / "launch" / "train.py",
               "--config", ROOT / "configs" / "zero2.json", "--set", f"model.pretrained={model}"]  # fmt: skip
    done = run(command, folder=tmp_path)
    assert "Transformers computes the same from best/" in done.stderr
    folder = tmp_path / "runs" / "zero2"
    epochs = json.loads((ROOT / "configs" / "zero2.json").read_text())["train"]["epochs"]
    assert len(losses(folder)) % epochs == 0
    AutoModelForCTC.from_pretrained(folder / "best")
    assert "all " in run(command, folder=tmp_path).stderr


# --- what cannot be kept is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [False, True])
def test_a_head_for_other_symbols_is_never_laid_under_ours(fits: bool, tmp_path: Path) -> None:
    """Also if it has as many outputs as the shard set has symbols, each of which would mean another one."""
    source = publish(tmp_path / "model", "wav2vec2", fine_tuned=True, file="safetensors")
    tokens = LETTERS_960H
    if fits:
        ours = vocab_of(PHONES).tokens
        tokens = [*ours[:2], *(f"<{number}>" for number in range(len(ours) - 3)), ours[-1]]
        resize_head(source, tokens)
    with pytest.raises(ModelError) as refused:
        load_model(ModelConfig(pretrained=str(source)))
    assert f"its head outputs its own symbols ({' '.join(tokens[:12])} …)" in refused.value.message
    assert "--set model.vocab=new" in str(refused.value.hint)
    model = load_model(ModelConfig(pretrained=str(source), vocab="new"))
    assert model.vocab == vocab_of(PHONES)
    theirs, ours = load_file(source / "model.safetensors")["lm_head.weight"], model.network.lm_head.weight
    assert (theirs.shape == ours.shape) == fits
    assert not torch.equal(theirs, ours)
    assert ours.std().item() == pytest.approx(0.02, rel=0.2)  # as Transformers begins


def resize_head(model: Path, tokens: list[str]) -> None:
    """Give a published model another vocabulary and a head for it."""
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"], weights["lm_head.bias"] = torch.randn(len(tokens), 32), torch.zeros(len(tokens))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    write(model / "config.json", config | {"vocab_size": len(tokens), "pad_token_id": 0})
    write(model / "vocab.json", {token: number for number, token in enumerate(tokens)})


def test_a_model_that_has_all_symbols_and_more_keeps_its_head_and_ids(tmp_path: Path) -> None:
    source = publish(tmp_path / "model", "wavlm", fine_tuned=True, file="safetensors")
    ours = vocab_of(PHONES).tokens
    tokens = [ours[0], "ø", *ours[1:], "ʙ"]
    resize_head(source, tokens)
    model = load_model(ModelConfig(pretrained=str(source)))
    assert list(model.vocab.tokens) == tokens
    assert torch.equal(model.network.lm_head.weight, load_file(source / "model.safetensors")["lm_head.weight"])
    config = json.loads((source / "config.json").read_text())
    write(source / "config.json", config | {"pad_token_id": 1})  # its blank is another output
    with pytest.raises(ModelError, match="its head outputs its own symbols"):
        load_model(ModelConfig(pretrained=str(source)))


def test_a_head_of_more_outputs_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """Some fine-tuned models name <s> and </s> in added_tokens.json alone."""
    source = publish(tmp_path / "model", "wav2vec2", fine_tuned=True, file="safetensors")
    resize_head(source, [*vocab_of(PHONES).tokens, "<s>", "</s>"])
    tokens = json.loads((source / "vocab.json").read_text())
    write(source / "vocab.json", {token: number for token, number in tokens.items() if not token.endswith("s>")})
    with pytest.raises(ModelError, match="its head outputs its own symbols"):
        load_model(ModelConfig(pretrained=str(source)))
    config = json.loads((source / "config.json").read_text())
    write(source / "config.json", config | {"vocab_size": len(vocab_of(PHONES))})
    with pytest.raises(
        ModelError, match=r"no CTC head of its own: lm_head\.\S+ is \(56,.*\) in the file, \(54,.*\) in"
    ):
        load_trained(source)


def test_a_model_without_its_tokens_is_not_taken_for_one_of_ours(tmp_path: Path) -> None:
    source = publish(tmp_path / "model", "hubert", fine_tuned=True, file="bin")
    (source / "vocab.json").unlink()
    with pytest.raises(ModelError, match=r"its head outputs its own symbols \(not listed\)"):
        load_model(ModelConfig(pretrained=str(source)))


def strip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": weight for name, weight in weights.items()}


def lose_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if not name.endswith("layers.1.attention.k_proj.weight")}


def lose_positions(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if not name.endswith("weight_g")}


def widen(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {name: torch.zeros(48) for name in weights if name.endswith("layers.0.layer_norm.bias")}


def spoil(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {name: weight * torch.nan for name, weight in weights.items() if name.endswith("q_proj.bias")}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (strip, r"lacks \d+ weights of its encoder: (\S+ is missing, ){3}…; 0\.0% of the encoder was found"),
        (
            lose_one,
            r"lacks 1 weights of its encoder: \S+layers\.1\.attention\.k_proj\.weight is missing; 9\d\.\d%",
        ),
        (
            lose_positions,
            r"pos_conv_embed\.conv\.parametrizations\.weight\.original0 is missing; 9\d\.\d% of the encoder",
        ),
        (widen, r"layers\.0\.layer_norm\.bias is \(48,\) in the file, \(32,\) in the model"),
        (spoil, r"2 weights are not finite: \S+layers\.0\.attention\.q_proj\.bias"),
    ],
)
@pytest.mark.parametrize(("family", "fine_tuned"), [("wav2vec2", False), ("hubert", True)])
def test_an_encoder_that_is_not_all_there_is_refused_with_its_share(
    damage: object, told: str, family: str, fine_tuned: bool, tmp_path: Path
) -> None:
    source = publish(tmp_path / "model", family, fine_tuned, "bin")
    assert callable(damage)
    torch.save(damage(torch.load(source / "pytorch_model.bin")), source / "pytorch_model.bin")
    with pytest.raises(ModelError, match=told):
        load_model(ModelConfig(pretrained=str(source), vocab="new"))


def test_a_model_whose_outputs_are_not_numbers_is_never_exported(tmp_path: Path) -> None:
    """Weights of all zeros are finite, but a weight norm divides by their length."""
    model = load_model(ModelConfig(pretrained=str(publish(tmp_path / "model", "hubert", False, "bin"))))
    save_best(model.eval(), tmp_path / "best")
    (tmp_path / "best" / "SHA256SUMS").unlink()
    weights = load_file(tmp_path / "best" / "model.safetensors")
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_file(zeros, tmp_path / "best" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="differ by nan"):
        export_model(tmp_path / "best", tmp_path / "export")


def test_a_trained_model_without_its_head_is_refused(tmp_path: Path) -> None:
    source = publish(tmp_path / "model", "wav2vec2", fine_tuned=False, file="bin")
    model = load_model(ModelConfig(pretrained=str(source)))
    save_best(model.eval(), tmp_path / "best")
    (tmp_path / "best" / "SHA256SUMS").unlink()
    weights = load_file(tmp_path / "best" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "best" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has no CTC head of its own: lm_head\.weight is missing"):
        load_trained(tmp_path / "best")
    assert SPACE in model.vocab.tokens
