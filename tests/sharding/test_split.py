"""Long recordings are cut without losing a sample, at pauses, into pieces under the limit."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import silero_vad
import soundfile
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from sharding.audio.vad import HOP, VAD_WINDOW, Stretch, detect_speech, find_pauses, find_stretches
from sharding.labels.policy import policy_of
from sharding.report.ledger import Tally, ledger_row
from sharding.report.plots import DPI
from sharding.segment.acoustic_model import example_of, fit
from sharding.segment.cuts import Cut, choose_cuts
from sharding.segment.evidence import Evidence, hash_label
from sharding.segment.split import split_recording, words_by_evidence
from sharding.shardset.index import read_index, read_sample
from sharding.shardset.sample import Sample
from sharding.shardset.store import open_store
from sharding.sources.manifest import Utterance
from sharding.sources.synthetic import open_espeak, plan_children, say_phrase
from tests.tools.commands import ROOT, Command
from tests.tools.corpus import SAMPLE_RATE, make_corpus, read_manifest, recite

LIMIT = 25 * SAMPLE_RATE


@st.composite
def recordings(draw: st.DrawFn) -> tuple[int, list[Cut]]:
    """A length and candidates for cuts: any at all, and enough of them that a way through exists."""
    samples = draw(st.integers(LIMIT + 1, 6 * LIMIT))
    places = set(draw(st.lists(st.integers(1, samples - 1), max_size=30)))
    places |= set(range(draw(st.integers(1, LIMIT)), samples, draw(st.integers(LIMIT // 5, LIMIT))))
    qualities = st.floats(0, 1)
    return samples, [Cut(place, draw(qualities), draw(st.booleans())) for place in sorted(places)]


@given(recordings())
def test_no_piece_is_over_the_limit_whatever_the_candidates(recording: tuple[int, list[Cut]]) -> None:
    samples, candidates = recording
    chosen = choose_cuts(samples, candidates, LIMIT)
    assert set(chosen) <= set(candidates)
    ends = [0, *(cut.position for cut in chosen), samples]
    assert all(0 < end - start <= LIMIT for start, end in itertools.pairwise(ends))


def test_a_good_pause_is_preferred_to_a_forced_cut_and_a_poor_pause() -> None:
    at = [round(second * SAMPLE_RATE) for second in (10, 15, 20)]
    cuts = [Cut(at[0], 0.1, False), Cut(at[1], 0.9, False), Cut(at[2], 0.0, True)]
    assert choose_cuts(30 * SAMPLE_RATE, cuts, LIMIT) == [cuts[1]]


@pytest.mark.parametrize("limit_sec", [3.0, 7.5, 25.0])
@pytest.mark.parametrize("sound", ["phrases", "noise", "silence", "tone"])
def test_pieces_of_any_sound_tile_it_to_the_sample(sound: str, limit_sec: float) -> None:
    rng = np.random.default_rng(1)
    time = np.arange(40 * SAMPLE_RATE + 123) / SAMPLE_RATE
    sounds: dict[str, Callable[[], npt.NDArray[np.floating]]] = {
        "phrases": lambda: recite(["bɛd kæt", "tu θri fɔɹ", "dɑg"] * 12, 0, rng),
        "noise": lambda: rng.normal(0, 0.1, len(time)),
        "silence": lambda: np.zeros(len(time)),
        "tone": lambda: 0.5 * np.sin(2 * np.pi * 220 * time),
    }
    waveform = sounds[sound]().astype(np.float32)
    segments = split_recording("parent", waveform, "bɛd kæt tu", limit_sec)
    ends = [round(segment.end_sec * SAMPLE_RATE) for segment in segments]
    assert [round(segment.start_sec * SAMPLE_RATE) for segment in segments] == [0, *ends[:-1]]
    assert ends[-1] == len(waveform)
    assert all(0 < segment.samples <= limit_sec * SAMPLE_RATE for segment in segments)
    assert all(not segment.text for segment in segments if segment.label_status != "labelled")


def test_phrases_are_cut_only_where_the_room_alone_is_heard() -> None:
    waveform = recite(["bɛdkæt", "tuθrifɔɹ", "dɑgsɪks"] * 15, 0, np.random.default_rng(2))
    segments = split_recording("parent", waveform, "", 25.0)
    assert len(segments) > 1
    for segment in segments[:-1]:
        cut = round(segment.end_sec * SAMPLE_RATE)
        assert not segment.forced
        assert np.abs(waveform[cut - 800 : cut + 800]).max() < 0.02  # its noise has a deviation of 0.003


def test_the_voice_detector_leaves_torch_as_it_was() -> None:
    """In a process of its own, because the detector is loaded once."""
    program = """
import numpy, torch
torch.set_num_threads(2)
before = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_num_interop_threads(), torch.initial_seed()
from sharding.audio.vad import detect_speech
detect_speech(numpy.zeros(16_000, numpy.float32))
after = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_num_interop_threads(), torch.initial_seed()
print(before == after, before, after)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("True"), done.stdout


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("long") / "brook", clips=2, long_clips=2, children=2, seed=3)


@pytest.fixture(scope="module")
def long_samples(long_corpus: Path, run_sharding: Command) -> list[Sample]:
    """Every sample of a shard set of which one long recording is for training and one for validation.

    No word of it is so well heard that a piece gets its words.
    """
    out = long_corpus.parent / "shards"
    done = run_sharding("build", long_corpus, "--out", out, "--min-word-llr", 1_000)
    assert done.returncode == 0, done.stderr
    store = open_store(out)
    index = read_index(store)
    return [read_sample(store, index, row) for row in range(len(index.samples))]


def test_the_pieces_in_the_shards_are_the_recording_to_the_bit(
    long_corpus: Path, long_samples: list[Sample], tmp_path: Path
) -> None:
    for row in read_manifest(long_corpus)[2:]:
        pieces = sorted(
            (sample for sample in long_samples if sample.parent_id == row["utterance_id"]),
            key=lambda piece: piece.piece,
        )
        assert [piece.piece for piece in pieces] == list(range(pieces[0].pieces))
        assert pieces[0].pieces > 1
        pcm = [soundfile.read(io.BytesIO(piece.audio), dtype="int16")[0] for piece in pieces]
        whole, _ = soundfile.read(long_corpus / row["audio_path"], dtype="int16")
        np.testing.assert_array_equal(np.concatenate(pcm), whole)
        assert max(map(len, pcm)) <= LIMIT
        assert [piece.start_sec for piece in pieces] == [0.0, *(piece.end_sec for piece in pieces[:-1])]
        assert pieces[-1].end_sec == len(whole) / SAMPLE_RATE


def test_a_validation_recording_is_kept_whole_for_one_score(long_corpus: Path, long_samples: list[Sample]) -> None:
    texts = {row["utterance_id"]: row["phonetic_text"] for row in read_manifest(long_corpus)}
    pieces = [sample for sample in long_samples if sample.label_status == "reference"]
    assert len({piece.recording_id for piece in pieces}) == 1
    for piece in pieces:
        assert piece.text == ""
        assert piece.parent_text == (texts[piece.recording_id] if piece.piece == 0 else None)


def test_a_training_piece_without_a_sure_label_keeps_the_whole_text_beside_it(
    long_corpus: Path, long_samples: list[Sample]
) -> None:
    texts = {row["utterance_id"]: row["phonetic_text"] for row in read_manifest(long_corpus)}
    unsure = [sample for sample in long_samples if sample.label_status == "unlabelled"]
    assert unsure
    assert all((piece.text, piece.parent_text) == ("", texts[piece.parent_id]) for piece in unsure)


def test_the_split_command_shows_every_piece(long_corpus: Path, run_sharding: Command) -> None:
    row = read_manifest(long_corpus)[-1]
    done = run_sharding("split", long_corpus / row["audio_path"], "--text", row["phonetic_text"], "--max-duration", 10)
    head, *lines = done.stdout.splitlines()
    assert head == f"{row['audio_duration_sec']:.2f} s in {len(lines)} segments"
    assert len(lines) >= 3
    assert json.loads(f"[{lines[0].split()[0]}]") == [0.0]


def test_the_split_command_draws_what_it_did(long_corpus: Path, run_sharding: Command, tmp_path: Path) -> None:
    row = read_manifest(long_corpus)[-1]
    done = run_sharding("split", long_corpus / row["audio_path"], "--text", row["phonetic_text"], "--plot",
                        tmp_path / "split.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert imread(tmp_path / "split.png").shape[1] == 14 * DPI


# --- what is heard ----------------------------------------------------------------------------------------------------


def heard(text: str, cuts: list[int], words_before: list[int], probability: float, inside: float) -> Evidence:
    """As a model would tell it that hears every word well, in the one way."""
    words = len(text.split())
    every = [(value,) * len(cuts) for value in (probability, inside)]
    return Evidence(hash_label(text), tuple(cuts), tuple(words_before), *every, (0.0,) * (len(cuts) + 1),
                    (9.0,) * words, (9.0,) * words, (0,) * words, (100 * SAMPLE_RATE,) * words, None)  # fmt: skip


def test_what_sounds_say_is_checked_where_a_model_has_labelled() -> None:
    words = [word for number in range(30) for word in ("kætɪ", "ʃuzən", "dɑgzɪ")]
    waveform, text = recite(words, 0, np.random.default_rng(5)), " ".join(words)
    sounds = fit([example_of("parent", text, waveform)], policy_of("pasketti"), max_false_accept=1.0)
    first = split_recording("parent", waveform, text, acoustic_model=sounds)
    assert {segment.by for segment in first} == {"acoustic_model"}
    assert all(segment.pass1 is None for segment in first)
    assert " ".join(segment.text for segment in first).split() == words
    cuts = [round(segment.end_sec * SAMPLE_RATE) for segment in first[:-1]]
    before = list(itertools.accumulate(len(segment.text.split()) for segment in first[:-1]))
    listening = detect_speech(waveform)
    stretches = find_stretches(listening, find_pauses(listening), len(waveform))
    for shift, right in ((0, True), (1, False)):
        evidence = replace(
            sounds.align(text, waveform, stretches, cuts),
            words_before=tuple(count + shift for count in before),
            gaps=(0.0,) * len(first),
        )
        second = split_recording("parent", waveform, text, evidence=evidence, acoustic_model=sounds)
        assert [segment.pass1 and segment.pass1.confidence for segment in second] == [s.confidence for s in first]
        assert {segment.pass1 and segment.pass1.right for segment in second} == {right}
        utterance = Utterance("u", "", "", "", "corpus", "u.flac", 60.0, "", "", None, text)
        tally = Tally()
        tally.count(ledger_row(utterance, "train", "split", 60.0, pieces=[asdict(segment) for segment in second]))
        assert sum(tally.pass1_counts.values()) == len(second)
        assert sum(tally.pass1_wrong.values()) == (0 if right else len(second))


def test_a_cut_in_a_pause_is_between_words_whatever_the_model_hears_there() -> None:
    text, samples = "kæt dɑg", 64_000
    speech = [Stretch(0, 30_000, True), Stretch(34_000, 64_000, True)]
    for forced, confidence in ((False, 1.0), (True, 0.45)):
        cuts = [Cut(32_000, 1.0, forced)]
        pieces = words_by_evidence(text, heard(text, [32_000], [1], 0.45, 0.55), cuts, speech, samples)
        assert [piece.confidence for piece in pieces] == pytest.approx([confidence] * 2)
        assert [piece.text for piece in pieces] == ["kæt", "dɑg"]
    nearly_never = heard(text, [32_000], [1], 0.001, 0.999)
    cuts = [Cut(32_000, 1.0, False)]
    assert all(piece.refused for piece in words_by_evidence(text, nearly_never, cuts, speech, samples))


def test_speech_where_no_word_is_heard_refuses_the_piece_that_has_it() -> None:
    text, cuts, samples = "kæt dɑg", [Cut(32_000, 1.0, False)], 64_000
    evidence = replace(heard(text, [32_000], [1], 1.0, 0.0), starts=(0, 40_000), ends=(9_000, 60_000))
    for voiced in (True, False):
        stretches = [Stretch(0, 10_000, True), Stretch(20_000, 30_000, voiced), Stretch(34_000, 64_000, True)]
        first, second = words_by_evidence(text, evidence, cuts, stretches, samples)
        assert bool(first.refused and first.refused.endswith("at 1.2 – 1.9 s")) == voiced
        assert second.refused is None


@given(st.lists(st.integers(0, 100), min_size=4, max_size=12), st.integers(0, 100), st.integers(1, 30))
def test_a_stretch_has_a_word_where_they_have_a_moment_in_common(edges: list[int], start: int, length: int) -> None:
    starts, ends = sorted(edges[::2]), sorted(edges[1::2])
    spans = [(first, max(first + 1, last)) for first, last in zip(starts, ends, strict=False)]
    evidence = replace(
        heard("kæt", [], [], 1.0, 0.0), starts=tuple(first for first, _ in spans), ends=tuple(last for _, last in spans)
    )
    moments = set(range(start, start + length))
    assert evidence.has_word(start, start + length) == any(moments & set(range(*span)) for span in spans)


@pytest.mark.parametrize(("pause_sec", "long"), [(0.29, False), (0.31, True)])
@pytest.mark.parametrize(("start", "end", "over"), [(0, 1, True), (-1, 0, False), (300, 400, True)])
def test_a_word_that_goes_on_after_a_pause_is_refused(
    pause_sec: float, long: bool, start: int, end: int, over: bool
) -> None:
    """`start` and `end` say by how many samples it begins before the pause, and ends after it."""
    text, cuts, samples = "kæt dɑg", [Cut(42_000, 1.0, False)], 64_000
    resumed = 10_000 + round(pause_sec * SAMPLE_RATE)
    stretches = [Stretch(0, 10_000, True), Stretch(resumed, 40_000, True), Stretch(44_000, 64_000, True)]
    evidence = replace(
        heard(text, [42_000], [1], 1.0, 0.0), starts=(9_999 - start, 45_000), ends=(resumed + end, 63_000)
    )
    first, second = words_by_evidence(text, evidence, cuts, stretches, samples)
    assert (first.refused == "a word spans a pause: 'kæt'") == (over and long)
    assert second.refused is None


def test_words_that_are_likelier_the_other_way_round_are_refused() -> None:
    text, cuts, samples = "kæt dɑg kæt dɑg", [Cut(32_000, 1.0, False)], 64_000
    evidence = replace(heard(text, [32_000], [2], 1.0, 0.0), order=(-0.1, -5.0, 7.0, 9.0))
    stretches = [Stretch(0, 30_000, True), Stretch(34_000, 64_000, True)]
    first, second = words_by_evidence(text, evidence, cuts, stretches, samples)
    assert first.refused == "two words are likelier in reverse order: 'kæt dɑg'"
    assert second.refused is None  # what comes over the cut is the cut's business


# --- what a model has heard -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(long_corpus: Path, long_samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a model that hears all would align the recording for training: half of its words lie before each cut."""
    (name,) = {sample.parent_id for sample in long_samples if sample.label_status == "unlabelled"}
    (manifest_row,) = (row for row in read_manifest(long_corpus) if row["utterance_id"] == name)
    ends = sorted(sample.end_sec or 0 for sample in long_samples if sample.parent_id == name)
    words = manifest_row["phonetic_text"].split()
    each = ends[-1] / len(words)  # seconds
    row = {
        "utterance_id": name,
        "text": " ".join(words),
        "cuts": [
            {"at": end, "words_before": len(words) // 2, "probability": 0.999, "inside": 0.0} for end in ends[:-1]
        ],
        "words": [
            {"word": word, "start": number * each, "end": (number + 1) * each, "evidence": 9.0, "order": 9.0}
            for number, word in enumerate(words)
        ],
        "pieces": [{"gap": 3.0}] * len(ends),
        "without": [20.0],
        "error": None,
    }
    path = tmp_path_factory.mktemp("aligned") / "alignments.jsonl.zst"
    path.write_bytes(zstandard.compress((json.dumps(row, ensure_ascii=False) + "\n").encode()))
    return path


def spoilt(aligned: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    row = json.loads(zstandard.decompress(aligned.read_bytes()))
    change(row)
    out.write_bytes(zstandard.compress((json.dumps(row, ensure_ascii=False) + "\n").encode()))
    return out


def read_all(out: Path) -> dict[str, Sample]:
    store = open_store(out)
    index = read_index(store)
    return {sample.key: sample for sample in (read_sample(store, index, row) for row in range(len(index.samples)))}


def test_with_alignments_the_audio_stays_and_the_labels_come(
    aligned: Path, long_corpus: Path, long_samples: list[Sample], tmp_path: Path, run_sharding: Command
) -> None:
    done = run_sharding("build", long_corpus, "--out", tmp_path / "out", "--alignments", aligned)
    assert done.returncode == 0, done.stderr
    before, after = {sample.key: sample for sample in long_samples}, read_all(tmp_path / "out")
    assert {key: sample.audio for key, sample in after.items()} == {key: s.audio for key, s in before.items()}
    (name,) = {sample.parent_id for sample in long_samples if sample.label_status == "unlabelled"}
    pieces = sorted((sample for sample in after.values() if sample.parent_id == name), key=lambda piece: piece.piece)
    texts = {row["utterance_id"]: row["phonetic_text"] for row in read_manifest(long_corpus)}
    assert " ".join(piece.text for piece in pieces).split() == texts[name].split()
    others = {key: sample for key, sample in after.items() if sample.parent_id != name}
    assert others == {key: sample for key, sample in before.items() if sample.parent_id != name}
    shard = next((tmp_path / "out/train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    refused = run_sharding("verify", tmp_path / "out", "--repair", long_corpus)
    assert refused.returncode == 1
    assert "was built with a file of alignments" in refused.stderr
    mended = run_sharding("verify", tmp_path / "out", "--repair", long_corpus, "--alignments", aligned)
    assert mended.returncode == 0, mended.stderr
    assert read_all(tmp_path / "out") == after


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another label": (lambda row: row.update(text=row["text"] + "t"), "(a different label was aligned)"),
    "other cuts": (lambda row: row["cuts"][0].update(at=row["cuts"][0]["at"] + 0.01), "(different cuts were aligned)"),
    "an unsure cut": (lambda row: row["cuts"][0].update(probability=0.94), "a cut is uncertain: 0.94"),
    "a cut inside a word": (
        lambda row: row["cuts"][0].update(probability=0.001, inside=0.999), "a cut is uncertain: 0.10",
    ),
    "something else is heard": (
        lambda row: row["pieces"].__setitem__(-1, {"gap": 25.0}), "the audio does not match the label",
    ),
    "a word that is not heard": (
        lambda row: row["words"][-1].update(evidence=-4.2), "a word lacks evidence: -4.2 nats for",
    ),
    "a label it failed on": (lambda row: row.update(error="too few frames"), "(not aligned: too few frames)"),
    "all words at once": (
        lambda row: [cut.update(words_before=len(row["text"].split()) - 1) for cut in row["cuts"]],
        "symbols per second of speech",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_sure_is_refused_with_its_reason(
    why: str, aligned: Path, long_corpus: Path, tmp_path: Path, run_sharding: Command
) -> None:
    change, said = REFUSED[why]
    path = spoilt(aligned, tmp_path / "spoilt.jsonl.zst", change)
    done = run_sharding("build", long_corpus, "--out", tmp_path / "out", "--alignments", path)
    assert done.returncode == 0, done.stderr
    ledger = zstandard.ZstdDecompressor().stream_reader((tmp_path / "out/report/ledger.jsonl.zst").read_bytes()).read()
    pieces = [piece for row in map(json.loads, ledger.decode().splitlines()) for piece in row["pieces"]]
    reasons = [piece["reason"] for piece in pieces if piece["label_status"] == "unlabelled"]
    assert any(said in reason for reason in reasons), reasons


@pytest.mark.parametrize("damage", ["cut off", "no rows", "missing", "text"])
def test_a_file_of_alignments_that_is_none_is_named(
    damage: str, aligned: Path, long_corpus: Path, tmp_path: Path, run_sharding: Command
) -> None:
    path = tmp_path / "a.jsonl.zst"
    contents = {"cut off": aligned.read_bytes()[:-9], "no rows": zstandard.compress(b'{"a": 1}\n'), "text": b"kaet\n"}
    if damage in contents:
        path.write_bytes(contents[damage])
    done = run_sharding("build", long_corpus, "--out", tmp_path / "out", "--alignments", path)
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "streamtrain align MODEL SHARDS --out FILE" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["nothing.flac", "text.flac"])
def test_the_split_command_refuses_what_is_no_audio(file: str, tmp_path: Path, run_sharding: Command) -> None:
    (tmp_path / "text.flac").write_text("no sound")
    done = run_sharding("split", tmp_path / file)
    assert done.returncode == 1
    assert str(tmp_path / file) in done.stderr


@pytest.mark.parametrize("seconds", [0.05, 0.5, 3.2, 140.0])
def test_all_windows_at_once_are_heard_as_one_by_one(seconds: float) -> None:
    rng = np.random.default_rng(3)
    with open_espeak() as espeak:
        espeak.become(plan_children(2, 0)[0])
        said = np.concatenate([say_phrase(espeak, np.random.default_rng(seed))[0] for seed in range(80)])
    waveform = np.resize(said, round(seconds * SAMPLE_RATE)).astype(np.float32) / 32_768
    waveform += 0.003 * rng.standard_normal(len(waveform), np.float32)
    with torch.inference_mode():
        alone = silero_vad.load_silero_vad().audio_forward(torch.from_numpy(waveform)[None], SAMPLE_RATE)[0].numpy()
    assert seconds < 1 or (alone > 0.9).any()
    windows = np.minimum(np.arange(max(len(waveform) // HOP, 1)) * HOP // VAD_WINDOW, len(alone) - 1)
    np.testing.assert_allclose(detect_speech(waveform).speech, alone[windows], atol=1e-4)


def test_threads_that_listen_at_once_hear_what_one_hears() -> None:
    """The voice detector remembers: two recordings must not pass through it mixed."""
    sounds = [recite([f"kæt{'s' * number} ðɪʃu mowɛs"] * 6, 0, np.random.default_rng(number)) for number in range(8)]
    alone = [detect_speech(sound).speech for sound in sounds]
    with ThreadPoolExecutor(8) as pool:
        together = [heard.speech for heard in pool.map(detect_speech, sounds)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
