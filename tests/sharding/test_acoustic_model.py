"""The sounds of a corpus, learned from its own labels, tell which words lie where, and which labels are wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sharding.audio.codec import FRAME_SAMPLES
from sharding.audio.vad import Stretch
from sharding.labels.policy import LabelPolicy, policy_of
from sharding.labels.units import Units
from sharding.segment.acoustic_model import (
    DECODE_SCALE,
    PAUSE_NATS,
    PhoneGMM,
    _occupancy,
    example_of,
    fit,
    mfcc_features,
    unpack_model,
)
from sharding.segment.ctc_align import align
from sharding.segment.evidence import FALLBACK_SHARE, choose_max_gap
from sharding.segment.split import Segment, split_recording
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.store import open_store
from tests.tools.commands import Command
from tests.tools.corpus import SAMPLE_RATE, SYMBOL_SEC, Sound, make_corpus, make_text, read_manifest, recite

SPOKEN = "ɹkzbæmtɪduʃ"


def words_of(seed: int, count: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [make_text(0.5, SPOKEN, random).split()[0] for _ in range(count)]


def phrases_of(words: list[str]) -> list[str]:
    """Of one to three words."""
    random, phrases, start = np.random.default_rng(len(words)), [], 0
    while start < len(words):
        count = int(random.integers(1, 4))
        phrases.append(" ".join(words[start : start + count]))
        start += count
    return phrases


def said(seed: int, words: list[str]) -> Sound:
    return recite(phrases_of(words), 0, np.random.default_rng(seed))


def words_before(seed: int, words: list[str], second: float) -> int:
    """How many are said before that second of what `said` returns, which must be in a pause."""
    random, count, end = np.random.default_rng(seed), 0, 0.0
    if not second:
        return 0
    for phrase in phrases_of(words):
        start = end + (random.uniform(0.4, 0.9) if count else 0.0)
        if second < start:
            assert second > end
            break
        end = start + len(phrase) * SYMBOL_SEC
        count += len(phrase.split())
    return count


@pytest.fixture(scope="module")
def sounds() -> PhoneGMM:
    corpus = {f"{seed}": words_of(seed, 40) for seed in range(9)}
    examples = [example_of(name, " ".join(words), said(int(name), words)) for name, words in corpus.items()]
    learned = fit(examples, policy_of("pasketti"), max_false_accept=0.02)
    assert learned is not None
    return learned


def split(sounds: PhoneGMM, waveform: Sound, words: list[str]) -> list[Segment]:
    return split_recording("parent", waveform, " ".join(words), acoustic_model=sounds)


@pytest.mark.parametrize("seed", range(20, 24))
def test_pieces_get_the_words_that_are_said_in_them(seed: int, sounds: PhoneGMM) -> None:
    words = words_of(seed, 120)
    segments = split(sounds, said(seed, words), words)
    assert len(segments) > 2
    assert {segment.by for segment in segments} == {"acoustic_model"}
    assert any(segment.label_status == "labelled" for segment in segments)
    for segment in segments:
        first, last = (words_before(seed, words, second) for second in (segment.start_sec, segment.end_sec))
        true = words[first:last]
        assert segment.text.split() == (true if segment.label_status == "labelled" else [])
        assert bool(segment.reason) == (segment.label_status == "unlabelled")


@pytest.mark.parametrize("seed", range(20, 24))
@pytest.mark.parametrize("kind", ["dropped", "doubled", "swapped", "another's"])
def test_a_wrong_label_is_refused_where_it_is_wrong(seed: int, kind: str, sounds: PhoneGMM) -> None:
    words = words_of(seed, 120)
    wrong = {
        "dropped": words[:50] + words[51:],
        "doubled": words[:51] + words[50:],
        "swapped": [*words[:50], words[51], words[50], *words[52:]],
        "another's": words_of(seed + 100, 120),
    }[kind]
    segments = split(sounds, said(seed, words), wrong)
    assert any(segment.label_status == "unlabelled" for segment in segments)
    for segment in segments:
        if segment.label_status == "labelled":
            first, last = (words_before(seed, words, second) for second in (segment.start_sec, segment.end_sec))
            assert segment.text.split() == words[first:last]


def test_what_is_learned_does_not_depend_on_threads_and_leaves_them_as_they_were() -> None:
    examples = [example_of("one", " ".join(words_of(1, 30)), said(1, words_of(1, 30)))]
    before, learned = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            learned.append(fit(examples, policy_of("pasketti"), 0.02))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, two = learned
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one.mean, two.mean)
    assert one.max_gap == two.max_gap


def test_frames_are_as_many_as_the_sound_has_and_pauses_are_quiet() -> None:
    for samples in (1_600, 16_000, 25 * SAMPLE_RATE + 77, 60 * SAMPLE_RATE):
        sound = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
        features, quiet = mfcc_features(sound, [Stretch(samples // 2, samples, True)])
        assert len(features) == len(quiet) == samples // FRAME_SAMPLES
        assert np.isfinite(features).all()
        assert quiet[: samples // 2 // FRAME_SAMPLES].all()
        assert not quiet[-1]
    np.testing.assert_allclose(features[~quiet].mean(axis=0), 0, atol=1e-3)  # of the speech alone


@pytest.mark.parametrize(("phrases", "apart"), [(["kætɪ", "ʃumtə"], True), (["kætɪ ʃumtə"], False)])
def test_a_pause_is_likelier_between_words_than_within_one(phrases: list[str], apart: bool, sounds: PhoneGMM) -> None:
    """As two words or as one, the label spells the same."""
    example = example_of("parent", "kætɪʃumtə", recite(phrases, 0, np.random.default_rng(3)))
    log_probs = sounds.log_probs(example.features, example.quiet, DECODE_SCALE)
    two, one = (align(log_probs, text, sounds).log_prob for text in ("kætɪ ʃumtə", "kætɪʃumtə"))
    assert two - one == pytest.approx(PAUSE_NATS if apart else 0.0, abs=0.5)


@pytest.mark.parametrize("units", ["segments", "tokens"])
def test_symbols_of_several_characters_are_learned_as_single_ones_are(units: Units) -> None:
    """Each phone written as two letters and a diacritic: the model is the same, and survives being packed."""
    spelt = {symbol: f"{symbol}ʰ" for symbol in SPOKEN}
    join = {"segments": "", "tokens": " "}[units]
    plain = [example_of(f"{seed}", " ".join(words_of(seed, 40)), said(seed, words_of(seed, 40))) for seed in range(2)]
    examples = [
        replace(each, text=" ".join(join.join(spelt[symbol] for symbol in word) for word in each.text.split()))
        for each in plain
    ]
    one = fit(examples, LabelPolicy("ipa", units, tuple(spelt.values())), 0.02)
    other = fit(plain, LabelPolicy("ipa", "characters", tuple(SPOKEN)), 0.02)
    assert one is not None
    assert other is not None
    if units == "segments":
        np.testing.assert_array_equal(one.mean, other.mean)
        assert one.max_gap == other.max_gap
    assert one.encode(examples[0].text) == other.encode(plain[0].text)
    kept = unpack_model(json.loads(json.dumps(one.pack())))
    assert (kept.alphabet, kept.units) == (tuple(sorted(spelt.values())), units)
    assert other.pack().keys() == {"alphabet", "max_gap", "values"}
    assert other.pack()["alphabet"] == "".join(sorted(SPOKEN))
    sound = said(0, words_of(0, 40))
    assert kept.align(examples[0].text, sound, [Stretch(0, len(sound), True)], [len(sound) // 2]).error is None


def test_every_frame_is_learned_from_once(sounds: PhoneGMM) -> None:
    example = example_of("parent", "kætɪʃumtə", recite(["kætɪ", "ʃumtə"], 0, np.random.default_rng(3)))
    assert _occupancy(sounds, example).sum(axis=1) == pytest.approx(np.ones(len(example.quiet)), abs=1e-5)


def test_nothing_is_learned_from_nothing(sounds: PhoneGMM) -> None:
    assert fit([], policy_of("pasketti"), 0.02) is None
    assert fit([example_of("mute", "", said(0, ["kæt"]))], policy_of("pasketti"), 0.02) is None
    crowded = example_of("crowded", " ".join(words_of(0, 60) * 40), said(0, words_of(0, 60)))
    burst = example_of("burst", "kæt", np.full(16_000, 1e30, np.float32))
    for useless in (crowded, burst):
        assert fit([useless], policy_of("pasketti"), 0.02) is None
    mute = fit([example_of("silence", "kæt", np.zeros(16_000, np.float32))], policy_of("pasketti"), 0.02)
    assert mute is not None
    assert np.isfinite(mute.precision).all()
    words = words_of(0, 60)
    alone = split_recording("parent", said(0, words), " ".join(words))
    (reason,) = {segment.reason for segment in alone}
    assert str(reason).startswith("too few labels to train the acoustic model")
    too_many = split(sounds, said(0, words), words * 40)
    assert {segment.reason for segment in too_many} == {"the label needs more frames than the recording has"}
    assert sounds.encode("kæt ☃") == [*sounds.encode("kæt"), len(sounds.alphabet) + 1]


def test_labels_may_differ_from_what_is_heard_by_what_trials_allow_unless_these_tell_nothing() -> None:
    gaps = [float(gap) for gap in range(1, 101)]
    telling, blind = [50.0 + gap for gap in gaps], [gap / 100 for gap in gaps]
    for share in (0.01, 0.1):
        bound = choose_max_gap(gaps, telling, share)
        assert np.mean(np.array(telling) <= bound) <= share
        assert np.mean(np.array(gaps) <= choose_max_gap(gaps, blind, share)) == pytest.approx(FALLBACK_SHARE, abs=0.01)
    assert choose_max_gap(gaps, blind, 0.0) == min(blind)  # no exception
    assert choose_max_gap(gaps, blind, 1.0) > max(gaps)  # all are believed
    assert choose_max_gap(gaps, [1e3] * 9, 0.01) < max(gaps)  # the unusual is refused in any case
    assert choose_max_gap(gaps, [], 0.01) == 0.0  # nothing was tried


def read_tars(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


def test_a_build_learns_from_its_short_clips_and_labels_long_ones(tmp_path: Path, run_sharding: Command) -> None:
    """Every word where it is said; to the same bytes by any number of workers."""
    corpus = make_corpus(tmp_path / "raw", clips=60, long_clips=6, children=3, seed=5)
    for workers in (1, 2):
        done = run_sharding("build", corpus, "--out", tmp_path / f"out{workers}", "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert "by acoustic_model" in done.stdout
        assert "learning" in done.stderr
    one, two = read_tars(tmp_path / "out1"), read_tars(tmp_path / "out2")
    assert one == two
    store = open_store(tmp_path / "out1")
    index = read_index(store)
    samples = [read_sample(store, index, row) for row in range(len(index.samples))]
    texts = {row["utterance_id"]: row["phonetic_text"] for row in read_manifest(corpus)}
    pieces = [sample for sample in samples if sample.parent_id and sample.label_status == "labelled"]
    assert pieces
    for piece in pieces:
        assert f" {piece.text} " in f" {texts[piece.parent_id]} "
    for path in (tmp_path / "out2").rglob("*.tar"):
        path.write_bytes(path.read_bytes()[:-2_000])
    mended = run_sharding("verify", tmp_path / "out2", "--repair", corpus)
    assert mended.returncode == 0, mended.stderr
    assert "learning" not in mended.stderr  # the index has what the build learned
    assert read_tars(tmp_path / "out2") == one


def test_an_index_keeps_all_that_was_learned(sounds: PhoneGMM) -> None:
    kept = unpack_model(json.loads(json.dumps(sounds.pack())))
    words = words_of(30, 100)
    assert split(kept, said(30, words), words) == split(sounds, said(30, words), words)
