"""Models as they are published, in names and files of their time, are trained, scored, saved and exported."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer, pipeline

import streamtrain as st
from sharding.errors import StreamtrainError
from sharding.labels.policy import LabelPolicy, policy_of
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.store import open_store
from streamtrain.config import ModelConfig
from streamtrain.infer.export import ExportError, export_model, save_best
from streamtrain.model.ctc import CTCModel, ctc_sum
from streamtrain.model.inference import decode_waveforms, zero_mean_unit_variance
from streamtrain.model.labels import take_labels
from streamtrain.model.pretrained import ModelError, load_model, load_trained
from streamtrain.model.vocab import SPACE, vocab_of
from streamtrain.training.run import _check_symbols
from streamtrain.training.trainer import TrainError
from tests.tools.corpus import make_corpus, read_manifest, write_manifest
from tests.tools.ports import free_port
from tests.tools.published import CLASSES, ESPEAK, LETTERS_960H, TOKENIZERS, publish, write
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
    assert model.vocab == vocab_of(policy_of("pasketti"))
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


# --- their vocabularies ---------------------------------------------------------------------------------------------

WORDS = policy_of("english")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_published_vocabulary_that_covers_the_labels_is_kept_with_its_head(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the same comes out: ids, special tokens, configuration, and what the pipeline writes."""
    source = publish(tmp_path / "model", "wav2vec2", True, "safetensors", tokenizer=TOKENIZERS[name], large=False)
    sharpen(source)
    theirs, tokenizer = AutoModelForCTC.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    with caplog.at_level("INFO", "streamtrain"):
        model = load_model(ModelConfig(pretrained=str(source), dropout=0.0), WORDS)
    assert "keeps its vocabulary of " in caplog.text
    upper, text = "E" in TOKENIZERS[name].tokens, "the cat's hat"
    assert model.vocab.encode(text) == tokenizer(text.upper() if upper else text).input_ids
    clip = sound(2)
    inputs = torch.from_numpy(zero_mean_unit_variance(clip))[None]
    extracted = AutoFeatureExtractor.from_pretrained(source)(clip, sampling_rate=16_000, return_tensors="pt")
    assert torch.allclose(extracted.input_values, inputs, rtol=0, atol=1e-5)
    with torch.inference_mode():
        expected = theirs(inputs).logits.log_softmax(-1)
        log_probs = model.eval()(inputs, torch.tensor([inputs.shape[1]]))
    assert torch.equal(log_probs, expected)
    check_loss(model, theirs, inputs, text)
    save_best(model, tmp_path / "best")
    saved = json.loads((tmp_path / "best" / "vocab.json").read_text())
    assert saved == {token: one for token, one in tokenizer.get_vocab().items() if one < log_probs.shape[-1]}
    config, before = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "best", source))
    assert [config[key] for key in TOLD_IN_CONFIG] == [before[key] for key in TOLD_IN_CONFIG]
    again = load_trained(tmp_path / "best")
    assert (again.vocab, again.labels) == (model.vocab, WORDS)
    check_pipeline(tmp_path / "best", again)


TOLD_IN_CONFIG = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def check_pipeline(folder: Path, model: CTCModel) -> None:
    """The pipeline writes what we write; special tokens, which it also writes, are left out."""
    clip = sound(2)
    ours = decode_waveforms(model, [clip], None)[0][0].text
    told = pipeline("automatic-speech-recognition", str(folder))({"raw": clip, "sampling_rate": 16_000})["text"]
    special = {model.vocab.unknown_token, *model.vocab.unwritten, *(token.lower() for token in model.vocab.unwritten)}
    for token in filter(None, special):
        told = told.replace(token, "")
    assert len(ours) > 3
    assert ours == ours.lower()
    assert " ".join(told.split()) == ours


def sound(seconds: int) -> np.ndarray:
    random = np.random.default_rng(4)
    pieces = [np.cumsum(random.normal(0, 0.02, 4000)) * gain for gain in random.uniform(0.1, 1, 4 * seconds)]
    return np.clip(np.concatenate(pieces), -0.9, 0.9).astype(np.float32)


def sharpen(model: Path) -> None:
    """Make a model output many symbols."""
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= 60
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def check_loss(model: CTCModel, theirs: Any, inputs: torch.Tensor, text: str) -> None:
    """The loss of lower-cased labels is Transformers', and reaches the head."""
    labels, samples = torch.tensor([model.vocab.encode(text)]), torch.tensor([inputs.shape[1]])
    theirs.config.ctc_loss_reduction = "sum"
    counts, frames = torch.tensor([labels.shape[1]]), model.frame_counts(samples)
    loss = ctc_sum(model(inputs, samples), frames, labels, counts, torch.ones(1), model.vocab.blank)
    assert loss.item() == pytest.approx(theirs(inputs, labels=labels).loss.item(), rel=1e-6)
    loss.backward()
    assert model.network.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


def nest(source: Path) -> None:
    write(source / "vocab.json", {"eng": {"<pad>": 0, "a": 1}, "fra": {"<pad>": 0, "é": 1}})


def move_blank(source: Path) -> None:
    write(source / "config.json", json.loads((source / "config.json").read_text()) | {"pad_token_id": 3})


def lose_tokens(source: Path) -> None:
    (source / "vocab.json").unlink()


def take_anothers(source: Path) -> None:
    write(source / "vocab.json", {token: number for number, token in enumerate([*LETTERS_960H, *"ÄÖÜ"])})


def keep(source: Path) -> None:
    assert (source / "vocab.json").exists()


@pytest.mark.parametrize(
    ("change", "policy", "told"),
    [
        (keep, policy_of("pasketti"), r"vocabulary \(<pad> <s> .* …\) does not serve: it has \d\d\.\d% of the labels'"),
        (
            keep,
            LabelPolicy("text", "characters", ("a", "b", "ж"), (9, 8, 1)),
            r"it lacks 'ж' U\+0436, which the labels have often",
        ),
        (nest, WORDS, r"no vocabulary \(it has one for each language: eng, fra, …\)"),
        (move_blank, WORDS, r"32 symbols, blank 0; the model has 32 and 3: the vocabulary is another model's"),
        (take_anothers, WORDS, r"35 symbols, blank 0; the model has 32 and 0"),
        (lose_tokens, WORDS, r"no vocabulary \(there is none\)"),
    ],
)
def test_a_vocabulary_that_does_not_serve_is_replaced_with_its_head_and_told(
    change: Callable[[Path], None], policy: LabelPolicy, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = publish(tmp_path / "model", "wav2vec2", True, "safetensors")
    change(source)
    with caplog.at_level("INFO", "streamtrain"):
        model = load_model(ModelConfig(pretrained=str(source)), policy)
    assert re.search(rf"gets a new head for the {len(policy.symbols)} symbols of the labels: .*{told}", caplog.text)
    assert model.vocab == vocab_of(policy)
    assert model.network.config.pad_token_id == model.vocab.blank
    with pytest.raises(ModelError, match=rf"its vocabulary cannot be kept: .*{told}"):
        load_model(ModelConfig(pretrained=str(source), vocab="own"), policy)


def test_what_is_asked_for_is_done_whatever_covers_the_labels(tmp_path: Path) -> None:
    source = publish(tmp_path / "model", "wav2vec2", True, "safetensors")
    assert load_model(ModelConfig(pretrained=str(source), vocab="own"), WORDS).vocab.tokens == tuple(LETTERS_960H)
    assert load_model(ModelConfig(pretrained=str(source), vocab="new"), WORDS).vocab == vocab_of(WORDS)
    encoder = publish(tmp_path / "encoder", "wav2vec2", False, "safetensors")
    torch.manual_seed(7)
    fresh = load_model(ModelConfig(pretrained=str(encoder)), WORDS)
    assert fresh.vocab == vocab_of(WORDS)  # it comes with letters, but without a head for them
    assert load_model(ModelConfig(pretrained=str(encoder), vocab="own"), WORDS).vocab.tokens == tuple(LETTERS_960H)
    for name in ("vocab.json", "tokenizer_config.json", "special_tokens_map.json"):
        (encoder / name).unlink()
    torch.manual_seed(7)
    alone = load_model(ModelConfig(pretrained=str(encoder)), WORDS)
    assert torch.equal(alone.network.lm_head.weight, fresh.network.lm_head.weight)


def test_a_phoneme_model_keeps_its_phones_for_labels_of_tokens(tmp_path: Path) -> None:
    source = publish(tmp_path / "model", "wav2vec2", True, "safetensors", tokenizer=ESPEAK, large=False)
    sharpen(source)
    phones = LabelPolicy("raw", "tokens", ("aɪ", "n", "s", "tʃ", "ɑː", "ə"))
    model = load_model(ModelConfig(pretrained=str(source)), phones)
    assert model.vocab.encode("tʃ aɪ ə") == [16, 15, 7]
    assert load_trained(source).vocab == model.vocab  # its files tell its units
    save_best(model.eval(), tmp_path / "best")
    assert json.loads((tmp_path / "best" / "vocab.json").read_text()) == json.loads((source / "vocab.json").read_text())
    again = load_trained(tmp_path / "best")
    check_pipeline(tmp_path / "best", again)
    segments = LabelPolicy("ipa", "segments", ("n", "s"))  # which it has, but no blank between words
    assert load_model(ModelConfig(pretrained=str(source)), segments).vocab == vocab_of(segments)


def test_a_published_model_takes_on_the_labels_that_it_is_scored_on_if_it_covers_them(tmp_path: Path) -> None:
    source = publish(tmp_path / "model", "wav2vec2", True, "bin")
    model = load_trained(source)
    assert (model.labels, model.vocab.case) == (None, "")
    with pytest.raises(StreamtrainError, match="vocabulary is not of labels of profile pasketti in characters: it has"):
        take_labels(model, policy_of("pasketti"))
    take_labels(model, WORDS)
    assert model.vocab.decode(model.vocab.encode("it's me")) == "it's me"
    with pytest.raises(StreamtrainError, match="writes profile english in characters, the labels are of profile pask"):
        take_labels(model, policy_of("pasketti"))
    with pytest.raises(StreamtrainError, match="the labels are of profile english in segments"):
        take_labels(model, LabelPolicy("english", "segments", WORDS.symbols))


def load_by_name(cache: Path) -> subprocess.CompletedProcess[str]:
    """Load a model by its name from a cache of huggingface_hub, without a network."""
    program = (
        "from sharding.labels.policy import policy_of\nfrom streamtrain.config import ModelConfig\n"
        "from streamtrain.model.pretrained import load_model\n"
        "model = load_model(ModelConfig(pretrained='facebook/tiny-960h'), policy_of('english'))\n"
        "print(model.vocab.encode('et'), model.normalize)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)


def test_a_name_of_the_hub_keeps_its_vocabulary_offline(tmp_path: Path) -> None:
    """From the cache, in the layout of huggingface_hub, with the files that were published and no others."""
    model = tmp_path / "hub" / "models--facebook--tiny-960h"
    snapshot = model / "snapshots" / ("0" * 40)
    publish(snapshot, "wav2vec2", True, "safetensors", large=False)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0" * 40)
    done = load_by_name(tmp_path)
    assert done.stdout == "[5, 6] True\n", done.stderr
    (snapshot / "vocab.json").unlink()  # its head is good, but nobody knows what its outputs mean
    done = load_by_name(tmp_path)
    assert "it has a head, whose vocabulary cannot be fetched" in done.stderr
    no_exist = model / ".no_exist" / ("0" * 40)  # as huggingface_hub notes that a model has no such file
    no_exist.mkdir(parents=True)
    (no_exist / "vocab.json").touch()
    done = load_by_name(tmp_path)
    assert done.stdout == "[7, 22] True\n", done.stderr


@pytest.mark.parametrize("name", ["/nonexistent/best", "./best", "runs/zero2/best"])
def test_a_folder_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"model '{name}'"):
        load_model(ModelConfig(pretrained=name), WORDS)


def test_letters_are_trained_scored_and_transcribed_with_a_published_vocabulary(work: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "raw", clips=24, symbols="etaoinsh")
    rows = [row | {"orthographic_text": row["phonetic_text"].title() + "!"} for row in read_manifest(corpus)]
    write_manifest(corpus, rows)
    run([sys.executable, "-m", "sharding", "build", corpus, "--out", tmp_path / "shards", "--track", "word"])
    source, folder = publish(tmp_path / "model", "wav2vec2", True, "safetensors", large=False), tmp_path / "run"
    done = run(training(work, "unused", f"data.shards={tmp_path / 'shards'}", f"model.pretrained={source}",
                        f"train.run_dir={folder}", "train.max_steps=2", "eval.every_steps=1"))  # fmt: skip
    assert "keeps its vocabulary of 32 tokens: it has 100.0% of the labels' symbols, in upper case" in done.stderr
    assert json.loads((folder / "best" / "vocab.json").read_text()) == dict(zip(LETTERS_960H, range(32), strict=True))
    assert json.loads((folder / "best" / "labels.json").read_text())["profile"] == "english"
    for model in (folder / "best", source):  # the published one too
        run([sys.executable, "launch/evaluate.py", "--model", model, "--shards", tmp_path / "shards",
             "--out", tmp_path / "evaluation"])  # fmt: skip
        lines = (tmp_path / "evaluation" / "hypotheses.jsonl").read_text().splitlines()
        texts = [json.loads(line)["hypothesis"] for line in lines]
        assert all(text == text.lower() for text in texts)
    card = json.loads((tmp_path / "evaluation" / "scorecard.json").read_text())
    evaluation = st.evaluate(st.load_model(source), tmp_path / "shards")  # its targets are in the model's case as well
    assert evaluation.loss == pytest.approx(card["loss"], rel=1e-6)
    clip = next(iter((corpus / "audio").glob("*.flac")))
    run([sys.executable, "-m", "streamtrain", "transcribe", folder / "best", clip, "--out", tmp_path / "out.jsonl"])
    assert "orthographic_text" in json.loads((tmp_path / "out.jsonl").read_text())


# --- what cannot be kept is replaced or refused ---------------------------------------------------------------------


@pytest.mark.parametrize("fits", [False, True])
def test_a_head_for_other_symbols_is_never_laid_under_ours(
    fits: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if it has as many outputs as the shard set has symbols, each of which would mean another one."""
    source = publish(tmp_path / "model", "wav2vec2", fine_tuned=True, file="safetensors")
    if fits:
        tokens = vocab_of(policy_of("pasketti")).tokens
        resize_head(source, [*tokens[:2], *(f"<{number}>" for number in range(len(tokens) - 3)), tokens[-1]])
    with caplog.at_level("INFO", "streamtrain"):
        model = load_model(ModelConfig(pretrained=str(source)))
    assert "gets a new head for the 51 symbols of the labels: " in caplog.text
    assert model.vocab == vocab_of(policy_of("pasketti"))
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
    ours = vocab_of(policy_of("pasketti")).tokens
    tokens = [ours[0], "ø", *ours[1:], "ʙ"]
    resize_head(source, tokens)
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").unlink()
    model = load_model(ModelConfig(pretrained=str(source)))
    assert list(model.vocab.tokens) == tokens
    assert torch.equal(model.network.lm_head.weight, load_file(source / "model.safetensors")["lm_head.weight"])


def test_labels_whose_common_symbols_have_no_token_stop_a_run_before_its_first_step(
    small_shards: Path, tmp_path: Path
) -> None:
    """The alphabet is covered by 96 %, but not what is said."""
    store = open_store(str(small_shards))
    index = read_index(store)
    texts = [read_sample(store, index, row).text for row in index.split("train").tolist()]
    common = [symbol for symbol, _ in Counter("".join(texts).replace(" ", "")).most_common(2)]
    source = publish(tmp_path / "model", "wav2vec2", fine_tuned=True, file="safetensors")
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").unlink()
    resize_head(source, [token for token in vocab_of(index.labels).tokens if token not in common])
    model = load_model(ModelConfig(pretrained=str(source)), index.labels)
    assert len(model.vocab) == len(vocab_of(index.labels)) - 2
    told = rf"\d+\.\d% of the labels' symbols have no token in the model's vocabulary: .*'{common[0]}' U\+"
    with pytest.raises(TrainError, match=told):
        _check_symbols(model, index, store)
    _check_symbols(load_model(ModelConfig(pretrained=str(source), vocab="new"), index.labels), index, store)


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    source = publish(tmp_path / "model", "wav2vec2", fine_tuned=True, file="safetensors")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"], weights["lm_head.bias"] = torch.randn(31, 32), torch.zeros(31)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    told = r"lm_head\.\S+ is \(31,.*\) in the file, \(32,.*\) in the model"
    with pytest.raises(ModelError, match=f"cannot be kept: {told}"):
        load_model(ModelConfig(pretrained=str(source), vocab="own"), WORDS)
    with pytest.raises(ModelError, match=f"no CTC head of its own: {told}"):
        load_trained(source)
    weights["lm_head.weight"], weights["lm_head.bias"] = torch.randn(60, 32), torch.zeros(60)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    write(source / "config.json", json.loads((source / "config.json").read_text()) | {"vocab_size": 60})
    with pytest.raises(ModelError, match="32 symbols, blank 0; the model has 60 and 0: the vocabulary is another"):
        load_trained(source)


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
