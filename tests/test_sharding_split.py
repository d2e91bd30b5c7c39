"""Long recordings are cut without losing a sample, at pauses, into pieces under the limit."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from conftest import ROOT, Command
from corpus import SAMPLE_RATE, make_corpus, read_manifest, recite
from hypothesis import given
from hypothesis import strategies as st

from sharding.format import read_index, read_sample
from sharding.pauses import listen
from sharding.sample import Sample
from sharding.split import Cut, choose_cuts, split_recording
from sharding.store import open_store

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
from sharding.pauses import listen
listen(numpy.zeros(16_000, numpy.float32))
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
    """Every sample of a shard set of which one long recording is for training and one for validation."""
    out = long_corpus.parent / "shards"
    done = run_sharding("build", long_corpus, "--out", out)
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
    done = run_sharding("split", long_corpus / row["audio_path"], "--text", row["phonetic_text"], "--limit-sec", 10)
    head, *lines = done.stdout.splitlines()
    assert head == f"{row['audio_duration_sec']:.2f} s in {len(lines)} pieces"
    assert len(lines) >= 3
    assert json.loads(f"[{lines[0].split()[0]}]") == [0.0]


@pytest.mark.parametrize("file", ["nothing.flac", "text.flac"])
def test_the_split_command_refuses_what_is_no_audio(file: str, tmp_path: Path, run_sharding: Command) -> None:
    (tmp_path / "text.flac").write_text("no sound")
    done = run_sharding("split", tmp_path / file)
    assert done.returncode == 1
    assert str(tmp_path / file) in done.stderr


def test_threads_that_listen_at_once_hear_what_one_hears() -> None:
    """The voice detector remembers: two recordings must not pass through it mixed."""
    sounds = [recite([f"kæt{'s' * number} ðɪʃu mowɛs"] * 6, 0, np.random.default_rng(number)) for number in range(8)]
    alone = [listen(sound).speech for sound in sounds]
    with ThreadPoolExecutor(8) as pool:
        together = [heard.speech for heard in pool.map(listen, sounds)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
