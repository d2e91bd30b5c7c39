"""Alignments are what all paths say: against brute force on small cases, and on joined clips whose joints are known."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import sharding.segment.ctc_align
from sharding.audio.codec import CONV_LAYERS, SAMPLE_RATE
from sharding.labels.pasketti import normalize_ipa
from sharding.labels.policy import policy_of
from sharding.segment.ctc_align import CERTAIN_NATS, AlignError, align, word_llrs
from sharding.segment.evidence import read_alignments
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.store import open_store
from streamtrain.infer.align import WHOLE_SEC, align_shards, windows_of
from streamtrain.model.ctc import CTCModel, count_frames
from streamtrain.model.vocab import BLANK, SPACE, UNKNOWN, Vocab, vocab_of
from tests.tools.commands import run_module
from tests.tools.corpus import make_corpus, read_manifest
from tests.tools.models import SLOW, make_network, save, talkative

Row = dict[str, Any]

VOCAB = Vocab((BLANK, SPACE, "a", "b", UNKNOWN))
LABELS = ("", "a", "aa", "ab", "a b", "a a", "b a b")


class Told(Vocab):
    """The blank within a word is told from that between words."""

    @property
    def blank_inside(self) -> int:
        return len(self.tokens)


VOCABS = (VOCAB, Told(VOCAB.tokens))


def labels_of(text: str, vocab: Vocab) -> list[int]:
    """What the states of a label emit."""
    labels = [vocab.blank_inside] * (2 * len(text) + 1)
    labels[1::2] = vocab.encode(text)
    for place in range(len(text) + 1):
        if " " in f" {text} "[place : place + 2]:
            labels[2 * place] = vocab.blank
    return labels


def frames_of(seed: int, frames: int, sharp: float = 2.0, symbols: int = len(VOCAB)) -> npt.NDArray[np.float64]:
    scores = sharp * np.random.default_rng(seed).normal(size=(frames, symbols))
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def every_path(log_probs: npt.NDArray[np.float64], text: str, vocab: Vocab = VOCAB) -> list[tuple[list[int], float]]:
    """Each path as the state of the label at each frame, and its probability."""
    labels = labels_of(text, vocab)
    paths = [([state], log_probs[0, labels[state]]) for state in range(min(2, len(labels)))]
    for frame in log_probs[1:]:
        paths = [
            ([*states, after], score + frame[labels[after]])
            for states, score in paths
            for step in (0, 1, 2)
            for after in [states[-1] + step]
            if after < len(labels) and (step < 2 or (after % 2 and labels[after] != labels[states[-1]]))
        ]
    return [(states, float(np.exp(score))) for states, score in paths if states[-1] >= len(labels) - 2]


@settings(max_examples=60)
@given(st.sampled_from(LABELS), st.integers(0, 9999), st.integers(1, 7), st.sampled_from(VOCABS))
def test_what_is_told_is_the_sum_over_all_paths(text: str, seed: int, frames: int, vocab: Vocab) -> None:
    log_probs = frames_of(seed, frames, symbols=max(len(VOCAB), vocab.blank_inside + 1))
    paths = every_path(log_probs, text, vocab)
    total = sum(weight for _, weight in paths)
    tensor = torch.from_numpy(log_probs).float()
    if not paths:
        with pytest.raises(AlignError, match=f"{frames} frames cannot spell {len(text)} symbols"):
            align(tensor, text, vocab)
        return
    found = align(tensor, text, vocab, cuts=range(frames))
    assert found.log_prob == pytest.approx(np.log(total), abs=1e-4)
    assert found.best_log_prob == pytest.approx(log_probs.max(axis=1).sum(), abs=1e-4)
    labels = labels_of(text, vocab)
    for time in range(frames):
        wanted = sum(weight * log_probs[time, labels[states[time]]] for states, weight in paths) / total
        assert found.gap[time] == pytest.approx(log_probs[time].max() - wanted, abs=1e-3)
    words = text.split()
    assert [word.text for word in found.words] == words
    ends = [place for place, symbol in enumerate(f"{text} ") if symbol == " "] if words else []
    spans = [(2 * (end - len(word)) + 1, 2 * end - 1) for word, end in zip(words, ends, strict=True)]
    for cut in range(frames):
        for count in range(len(words) + 1):
            low = spans[count - 1][1] if count else -1
            high = spans[count][0] if count < len(words) else 10**9
            wanted = sum(weight for states, weight in paths if low < states[cut] < high) / total
            assert found.before[cut, count] == pytest.approx(wanted, abs=1e-4)
    for word, (first, last) in zip(found.words, spans, strict=True):
        begun = [sum(w for states, w in paths if states[t] >= first) / total for t in range(frames)]
        over = [sum(w for states, w in paths if states[t] > last) / total for t in range(frames)]
        for time, passed in ((word.first_frame, begun), (word.end_frame, over)):
            at = [*passed, 1.0]
            if abs(min(at, key=lambda one: abs(one - 0.5)) - 0.5) > 1e-3:
                wanted = next(t for t, one in enumerate(at) if one >= 0.5)
                assert time == (wanted if passed is begun else max(wanted, word.first_frame + 1))


def sure_frames(path: list[int]) -> torch.Tensor:
    scores = np.full((len(path), len(VOCAB)), -12.0)
    scores[np.arange(len(path)), path] = 0
    return torch.from_numpy(scores - np.log(np.exp(scores).sum(1, keepdims=True))).float()


@settings(max_examples=30)
@given(st.sampled_from(["a", "aa", "ab", "bab"]), st.integers(0, 9999), st.integers(5, 7))
def test_evidence_for_an_only_word_is_its_probability_over_that_of_silence(text: str, seed: int, frames: int) -> None:
    log_probs = frames_of(seed, frames)
    said, silence = (sum(weight for _, weight in every_path(log_probs, label)) for label in (text, ""))
    tensor = torch.from_numpy(log_probs).float()
    ((evidence,), _) = word_llrs(tensor, align(tensor, text, VOCAB).words, VOCAB)
    assert evidence == pytest.approx(np.log(said / silence), abs=1e-3)


def test_an_alignment_is_found_under_any_unicode_form_of_its_id(tmp_path: Path) -> None:
    lists: dict[str, list[object]] = {name: [] for name in ("cuts", "pieces", "words", "without")}
    row = {"utterance_id": "ana\u0303o", "text": "", "error": None} | lists
    (tmp_path / "heard.jsonl.zst").write_bytes(zstandard.compress(json.dumps(row).encode() + b"\n"))
    heard = read_alignments(tmp_path / "heard.jsonl.zst")
    assert heard.of("an\u00e3o ") is heard.of("ana\u0303o") is not None
    assert heard.of("anao") is None


@pytest.mark.parametrize(("label", "unsaid"), [("b ab a", 1), ("b ab a ab", 1), ("b b ab a", 1), ("bb a", 0), ("", 0)])
def test_a_word_that_is_not_said_has_evidence_against_it(label: str, unsaid: int) -> None:
    """Nothing but "ab a" is said."""
    log_probs = sure_frames([0, 0, 2, 0, 3, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0])
    found = align(log_probs, label, VOCAB)
    evidence, _ = word_llrs(log_probs, found.words, VOCAB)
    assert len(evidence) == len(label.split())
    assert min(word_llrs(log_probs, align(log_probs, "ab a", VOCAB).words, VOCAB)[0]) > 10
    assert (min(evidence, default=0) < -1) == bool(unsaid)


@settings(max_examples=30)
@given(st.sampled_from(["a b", "ab b", "b ab"]), st.integers(0, 9999), st.integers(5, 7))
def test_evidence_for_an_order_is_its_probability_over_that_of_the_other(text: str, seed: int, frames: int) -> None:
    log_probs = frames_of(seed, frames)
    back = " ".join(reversed(text.split()))
    said, swapped = (sum(weight for _, weight in every_path(log_probs, label)) for label in (text, back))
    tensor = torch.from_numpy(log_probs).float()
    _, order = word_llrs(tensor, align(tensor, text, VOCAB).words, VOCAB)
    assert order == [pytest.approx(np.log(said / swapped), abs=1e-3), CERTAIN_NATS]


def test_a_sure_word_is_where_it_is_said_and_a_vague_one_says_so() -> None:
    log_probs = sure_frames([0, 0, 2, 2, 0, 3, 0, 1, 1, 0, 0, 0, 2, 0, 0, 0, 0])
    sure = align(log_probs, "ab a", VOCAB, cuts=[1, 3, 9, 15])
    assert [(word.text, word.first_frame, word.end_frame) for word in sure.words] == [("ab", 2, 6), ("a", 12, 13)]
    assert min(word.confidence for word in sure.words) > 0.99
    assert np.round(sure.before, 3).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    vague = align(torch.zeros(200, len(VOCAB)).log_softmax(1), "ab a", VOCAB, cuts=[100])
    assert max(word.confidence for word in vague.words) < 0.3
    assert vague.before.max() < 0.9


@given(st.integers(0, 99), st.integers(50, 400))
@settings(max_examples=10)
def test_blocks_change_nothing(seed: int, frames: int) -> None:
    """Long enough for many blocks, beside torch's own loss, and beside all frames in one block."""
    log_probs = torch.from_numpy(frames_of(seed, frames, sharp=1.0)).float()
    text = "ab a " * 5 + "b"
    whole = align(log_probs, text, VOCAB, cuts=range(frames))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.segment.ctc_align, "BLOCK_VALUES", 1)
        found = align(log_probs, text, VOCAB, cuts=range(frames))
    np.testing.assert_allclose(found.before, whole.before, atol=1e-4)
    np.testing.assert_allclose(found.gap, whole.gap, atol=1e-3)
    assert found.log_prob == pytest.approx(whole.log_prob, rel=1e-5)
    ids = torch.tensor(VOCAB.encode(text))
    loss = torch.nn.functional.ctc_loss(
        log_probs.double()[:, None], ids[None], torch.tensor([frames]), torch.tensor([len(ids)]),
        blank=VOCAB.blank, reduction="sum",
    )  # fmt: skip
    assert found.log_prob == pytest.approx(-float(loss), rel=1e-5)
    assert ((found.before.sum(axis=1) > -1e-4) & (found.before.sum(axis=1) < 1 + 1e-4)).all()
    mean = (found.before * np.arange(found.before.shape[1])).sum(axis=1)
    assert mean[-1] == pytest.approx(len(found.words) * found.before[-1].sum(), abs=1)
    times = list(itertools.chain(*((word.first_frame, word.end_frame) for word in found.words)))
    assert times == sorted(times)


@settings(max_examples=40)
@given(st.sampled_from(LABELS), st.integers(0, 9999), st.integers(5, 12))
def test_symbols_of_several_characters_align_as_single_ones_do(text: str, seed: int, frames: int) -> None:
    """Segments as characters; a label of tokens as one whose words have one character and no blank between them."""
    segments = Vocab((BLANK, SPACE, "kʰ", "t͡ʃ", UNKNOWN), units="segments")
    log_probs = torch.from_numpy(frames_of(seed, frames)).float()
    spelt = text.replace("a", "kʰ").replace("b", "t͡ʃ")
    one, other = align(log_probs, text, VOCAB, [3]), align(log_probs, spelt, segments, [3])
    assert [replace(word, text="") for word in one.words] == [replace(word, text="") for word in other.words]
    assert [word.text for word in other.words] == spelt.split()
    assert (one.log_prob, one.before.tolist()) == (other.log_prob, other.before.tolist())
    assert word_llrs(log_probs, one.words, VOCAB) == word_llrs(log_probs, other.words, segments)
    tokens = Vocab((BLANK, "|", "aa", "b#", UNKNOWN), delimiter=None, units="tokens")
    joined = text.replace(" ", "")
    apart = align(log_probs, " ".join({"a": "aa", "b": "b#"}[symbol] for symbol in joined), tokens)
    assert apart.log_prob == align(log_probs, joined, VOCAB).log_prob
    assert [word.text for word in apart.words] == [{"a": "aa", "b": "b#"}[symbol] for symbol in joined]


def test_no_frames_and_no_label() -> None:
    with pytest.raises(AlignError, match="there are no frames"):
        align(torch.zeros(0, len(VOCAB)), "a", VOCAB)
    empty = align(torch.zeros(9, len(VOCAB)).log_softmax(1), "", VOCAB, cuts=[4])
    assert empty.words == ()
    assert empty.before.tolist() == [[pytest.approx(1.0)]]


# --- whole recordings -------------------------------------------------------------------------------------------------


@given(st.integers(400, 200 * SAMPLE_RATE), st.sampled_from([2, 1, 3, 4]))
def test_windows_keep_every_frame_of_a_recording_once_and_hear_enough_for_it(samples: int, last_stride: int) -> None:
    geometry = (*CONV_LAYERS[:-1], (2, last_stride))

    def frame_count(samples: int) -> int:
        return int(count_frames(torch.tensor(samples), geometry))

    windows = list(windows_of(0, samples, geometry))
    kept = [frame for window in windows for frame in range(window.first, window.first + window.frames)]
    assert kept == list(range(frame_count(samples)))
    for window in windows:
        assert 0 <= window.start < window.end <= samples
        assert window.start == (window.first - window.skip) * 160 * last_stride
        assert frame_count(window.end - window.start) >= window.skip + window.frames
        assert window.end - window.start <= WHOLE_SEC * SAMPLE_RATE + 400


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Row], dict[str, Row]]:
    """Recordings, some of them long, and what a model that says something makes of their labels."""
    folder = tmp_path_factory.mktemp("aligned")
    make_corpus(folder / "raw", clips=8, children=3, long_clips=2)
    manifest = {row["utterance_id"]: row for row in read_manifest(folder / "raw")}
    assert run_module("sharding", "build", folder / "raw", "--out", folder / "shards").returncode == 0
    save(talkative("wav2vec2, group norm"), folder / "model")
    done = run_module(
        "streamtrain", "align", folder / "model", folder / "shards", "--out", folder / "a" / "out.jsonl.zst"
    )
    assert done.returncode == 0, done.stderr
    assert "10 labelled recordings" in done.stdout
    raw = zstandard.ZstdDecompressor().stream_reader((folder / "a" / "out.jsonl.zst").read_bytes()).read()
    found = {row["utterance_id"]: row for row in map(json.loads, raw.decode().splitlines())}
    return folder, manifest, found


def test_every_labelled_recording_is_aligned_whole(rows: tuple[Path, dict[str, Row], dict[str, Row]]) -> None:
    _, manifest, found = rows
    assert found.keys() == manifest.keys()
    for name, row in found.items():
        assert row["error"] is None
        assert row["text"] == normalize_ipa(manifest[name]["phonetic_text"])
        assert [word["word"] for word in row["words"]] == row["text"].split()
        assert row["seconds"] == pytest.approx(manifest[name]["audio_duration_sec"], abs=0.002)
        assert all(-CERTAIN_NATS <= word["evidence"] <= CERTAIN_NATS for word in row["words"])
        times = [edge for word in row["words"] for edge in (word["start"], word["end"])]
        assert times == sorted(times)
        assert times[-1] <= row["seconds"] + 0.02


def test_a_model_of_other_strides_aligns_by_its_own_frames(
    rows: tuple[Path, dict[str, Row], dict[str, Row]], tmp_path: Path
) -> None:
    folder, _, found = rows
    align_shards(
        save(talkative("wav2vec2, group norm", **SLOW), tmp_path / "slow"), str(folder / "shards"), tmp_path / "o"
    )
    raw = zstandard.ZstdDecompressor().stream_reader((tmp_path / "o").read_bytes()).read()
    for row in map(json.loads, raw.decode().splitlines()):
        times = [edge for word in row["words"] for edge in (word["start"], word["end"])]
        assert times == [pytest.approx(round(25 * time) / 25) for time in sorted(times)]
        assert row["seconds"] / 2 < times[-1] <= row["seconds"] + 0.04
        assert [cut["at"] for cut in row["cuts"]] == [cut["at"] for cut in found[row["utterance_id"]]["cuts"]]


def test_cuts_are_those_of_the_build(rows: tuple[Path, dict[str, Row], dict[str, Row]]) -> None:
    folder, manifest, found = rows
    store = open_store(folder / "shards")
    index = read_index(store)
    samples = [read_sample(store, index, row) for row in range(len(index.samples))]
    for name, row in found.items():
        starts = sorted(sample.start_sec for sample in samples if sample.parent_id == name and sample.piece)
        assert [cut["at"] for cut in row["cuts"]] == pytest.approx(starts, abs=1e-5)
        assert bool(starts) == (manifest[name]["audio_duration_sec"] > 25)
        assert all(
            0 <= cut["probability"] <= 1 and 0 <= cut["words_before"] <= len(row["words"]) for cut in row["cuts"]
        )
        counts = [cut["words_before"] for cut in row["cuts"]]
        assert counts == sorted(counts)
        assert len(row["pieces"]) == len(starts) + 1
        assert all(piece["gap"] >= 0 for piece in row["pieces"])
        assert bool(row["without"]) == bool(starts)


def test_a_build_takes_up_what_was_aligned(rows: tuple[Path, dict[str, Row], dict[str, Row]], tmp_path: Path) -> None:
    """From the command that writes the file to the one that reads it; twice, and by other numbers of workers."""
    folder, _, found = rows
    for out, workers in (("one", 1), ("two", 2)):
        done = run_module(
            "sharding", "build", folder / "raw", "--out", tmp_path / out, "--workers", workers,
            "--alignments", folder / "a/out.jsonl.zst", "--min-confidence", 0, "--max-false-accept", 1,
            "--min-word-llr", -1_000,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (
        {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in sorted((tmp_path / out).rglob("*.tar"))}
        for out in ("one", "two")
    )
    assert one == two
    store = open_store(tmp_path / "one")
    index = read_index(store)
    for row in range(len(index.samples)):
        sample = read_sample(store, index, row)
        if sample.parent_id and sample.label_status == "labelled":
            bounds = [0, *(cut["words_before"] for cut in found[sample.parent_id]["cuts"]), None]
            words = found[sample.parent_id]["text"].split()
            assert sample.text.split() == words[bounds[sample.piece] : bounds[sample.piece + 1]]


def test_a_damaged_recording_keeps_its_name(rows: tuple[Path, dict[str, Row], dict[str, Row]], tmp_path: Path) -> None:
    folder, manifest, _ = rows
    shards = shutil.copytree(folder / "shards", tmp_path / "shards")
    tar = next(iter((shards / "train").glob("*.tar")))
    damaged = bytearray(tar.read_bytes())
    damaged[700] ^= 1
    tar.write_bytes(damaged)
    assert align_shards(folder / "model", str(shards), tmp_path / "out.zst") == 10
    raw = zstandard.ZstdDecompressor().stream_reader((tmp_path / "out.zst").read_bytes()).read()
    (broken,) = (row for row in map(json.loads, raw.decode().splitlines()) if row["error"])
    assert broken["utterance_id"] in manifest
    assert "checksum of the sample at byte 0" in broken["error"]


def test_a_model_of_the_other_track_is_refused(
    rows: tuple[Path, dict[str, Row], dict[str, Row]], tmp_path: Path
) -> None:
    folder, _, _ = rows
    network = make_network("wav2vec2, group norm")
    vocab = vocab_of(policy_of("english"))
    network.lm_head = type(network.lm_head)(network.lm_head.in_features, len(vocab))
    network.config.vocab_size = len(vocab)
    other = save(CTCModel(network, vocab, normalize=True).eval(), tmp_path / "words")
    done = run_module("streamtrain", "align", other, folder / "shards", "--out", tmp_path / "out.jsonl.zst")
    assert done.returncode == 1
    assert (
        "the model writes profile english in characters, the labels are of profile pasketti in characters"
        in done.stderr
    )
    assert not list(tmp_path.glob("*.zst"))
