"""Generate a corpus spoken by espeak-ng in the challenge's layout: an input for `build`, and no step of it."""

import ctypes
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from tqdm import tqdm

from sharding.audio.flac import end_of_blocks
from sharding.errors import StreamtrainError
from sharding.files.writing import explaining, write, write_error

SAMPLE_RATE = 22_050  # espeak's own rate, so that the sharder has to resample
CORPORA = ("hillside", "riverside")
VALID_FRACTION = 0.1  # the default of `build --valid-fraction`
# Random ids of 24 children put no child in validation for 8 % of the seeds and one child for 21 %: too few clips
# to evaluate a model. So one child in eight (3 of 24, in both corpora) gets an id that falls in validation.
VALID_EVERY = 8
MINUTES_PER_LONG = 5.0  # 6 long recordings in the default 30 minutes
SHORTEST_LONG_SEC = 27.0  # the sharder splits above 25 s
SESSION_CLIPS = 30
DAMAGED_FROM = 100  # clips: `build` fails if more than one in a hundred is rejected
OWN_FILE = re.compile(r"audio/U_[0-9a-f]{16}\.flac|\.?train_phon_transcripts\.jsonl(\..*\.part)?")
WORD_GAP = 2  # units of about 10 ms: children pause between words

# Covers every phone of American English; has no word whose form depends on its neighbours, such as "the" and "a".
VOCABULARY = """
    apple baby ball banana bear bed big bird blue boat book bread brother bus butter car cat chair cheese
    cookie cow cup dog duck egg eight feather fish five flower foot garage giraffe green happy house juice
    jump kitten milk monkey moon mother mouth nose one orange purple red run shoe sing snow swim teacher
    three toy treasure tree truck two watch water window yellow zebra
"""
PHRASE_SHARES = (0.36, 0.27, 0.18, 0.11, 0.08)  # phrases of 1 to 5 words: children speak in short phrases

# Age → espeak's pitch (0 to 100) and words per minute: younger children speak higher and slower.
AGES = {
    "3-4": ((72, 85), (150, 170)),
    "5-7": ((68, 80), (155, 175)),
    "8-11": ((60, 75), (160, 180)),
    "12+": ((50, 65), (165, 185)),
}
VOICES = ("f1", "f2", "f3", "f4", "m3")  # few enough for a model that trains for five minutes

# espeak's symbol → the challenge's, which has no "a" and marks neither stress nor length nor syllables.
PHONES = {phone: phone for phone in "æɑɔʌəɛɪiʊuoɐɚbdfhjklmnŋpɹstvwzðθʃʒʔɾ "} | {
    "tʃ": "ʧ", "dʒ": "ʤ", "aɪ": "ɑi", "aʊ": "ɑʊ", "eɪ": "ei", "ɔɪ": "ɔi", "ɜ": "ɚ", "ᵻ": "ɪ", "ɡ": "g",
    "ː": "", "ˈ": "", "ˌ": "", "\N{COMBINING VERTICAL LINE BELOW}": "",
}  # fmt: skip
NEXT_PHONE = re.compile("|".join([*sorted(PHONES, key=len, reverse=True), "."]))  # "." matches an unknown symbol

# From espeak-ng's speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS, INITIALIZE_DONT_EXIT = 2, 0x8000
CHARS_UTF8, ENDPAUSE, PHONEMES_IPA = 1, 0x1000, 2
PARAMETER_RATE, PARAMETER_PITCH, PARAMETER_WORDGAP = 1, 3, 7
SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

Samples = NDArray[np.int16]


class DemoError(StreamtrainError):
    """Report that the demo corpus cannot be made; the message names what is missing."""


@dataclass(frozen=True)
class Speaker:
    """Describe a speaker, and how noisy the speaker's room is."""

    number: int
    child_id: str
    corpus: str
    age_bucket: str
    voice: str
    pitch: int
    words_per_minute: int
    snr_db: float


@dataclass(frozen=True)
class DemoRow:
    """Hold a line of `train_phon_transcripts.jsonl`, with the challenge's names of fields in their order."""

    utterance_id: str
    child_id: str
    session_id: str
    audio_path: str
    audio_duration_sec: float
    age_bucket: str
    md5_hash: str
    filesize_bytes: int
    phonetic_text: str


def make_demo_corpus(out: Path, minutes: float = 30.0, children: int = 24, seed: int = 0) -> None:
    """Write OUT/hillside and OUT/riverside: short clips, long recordings and, if there are many, a header-only clip.

    The same arguments give the same bytes, so a killed run is simply repeated. Clips of other arguments are removed. At
    least two recordings are long, so a corpus of less than two minutes becomes longer than requested.
    """
    if children < 2 or not 0 < minutes < float("inf"):
        raise DemoError(f"children must be at least 2 and minutes above 0, but are {children} and {minutes}")
    long_plan = plan_long_recordings(minutes, children)
    short_sec = max(minutes * 60 - sum(target for _, target in long_plan), minutes * 30)
    rows: dict[str, list[DemoRow]] = {corpus: [] for corpus in CORPORA}
    for corpus in CORPORA:
        _check_own(out / corpus)
        with explaining(out):
            (out / corpus / "audio").mkdir(parents=True, exist_ok=True)
    with open_espeak() as espeak:
        for child in tqdm(plan_children(children, seed), desc="speaking", unit="child"):
            targets = [target for number, target in long_plan if number == child.number]
            rows[child.corpus] += record_child(espeak, child, targets, short_sec / children, out, seed)
    clips = list(itertools.chain(*rows.values()))
    if damaged := len(clips) >= DAMAGED_FROM:
        # The first clip is child 0's, who is never in validation: the damage costs no score.
        rows[CORPORA[0]].append(write_header_only(clips[0], out / CORPORA[0], seed))
    for corpus in CORPORA:
        write_manifest(out / corpus, rows[corpus])
        current = {row.audio_path for row in rows[corpus]}
        for path in (out / corpus / "audio").iterdir():
            if f"audio/{path.name}" not in current:
                path.unlink()  # written by a run with other arguments
    summary = f"{sum(row.audio_duration_sec for row in clips) / 60:.1f} minutes by {children} children"
    print(
        f"demo corpus: {len(clips):,} clips, {summary}; {len(long_plan)} are long"
        + ", 1 more is only a header" * damaged
    )
    print(f"written to {' and '.join(str(out / corpus) for corpus in CORPORA)}")


def _check_own(folder: Path) -> None:
    """Raise DemoError if a folder contains anything but a demo corpus, whose files are replaced."""
    for path in folder.rglob("*"):
        if path.is_file() and not OWN_FILE.fullmatch(path.relative_to(folder).as_posix()):
            message = f"{folder}: contains {path.relative_to(folder)}, which is not part of a demo corpus"
            raise DemoError(message, "name another folder")


def plan_children(children: int, seed: int) -> list[Speaker]:
    """Return the speakers: the first half live in hillside, the others in riverside."""
    rng = np.random.default_rng(seed)
    voices = rng.permutation(VOICES)
    speakers = []
    for number in range(children):
        age_bucket = list(AGES)[rng.integers(len(AGES))]
        pitch, words_per_minute = (int(rng.integers(*span, endpoint=True)) for span in AGES[age_bucket])
        speakers.append(
            Speaker(
                number=number,
                child_id=choose_child_id(number, seed),
                corpus=CORPORA[number >= children // 2],
                age_bucket=age_bucket,
                voice=f"en-us+{voices[number % len(voices)]}",
                pitch=pitch,
                words_per_minute=words_per_minute,
                snr_db=rng.uniform(22.0, 38.0),
            )
        )
    return speakers


def choose_child_id(number: int, seed: int) -> str:
    """Return the first of a fixed sequence of ids on the wanted side of the split: 1, 9, 17 … are for validation."""
    wanted = number % VALID_EVERY == 1
    candidates = (derive_id("C", seed, number, attempt) for attempt in itertools.count())
    return next(child_id for child_id in candidates if is_validation(child_id) == wanted)


def is_validation(child_id: str) -> bool:
    """Return whether a child is in validation, by the sharder's rule: the first 64 bits of the SHA-256."""
    return int.from_bytes(hashlib.sha256(child_id.encode()).digest()[:8], "big") / 2**64 < VALID_FRACTION


def derive_id(prefix: str, *parts: object) -> str:
    return f"{prefix}_{hashlib.sha256(repr((prefix, *parts)).encode()).hexdigest()[:16]}"


def plan_long_recordings(minutes: float, children: int) -> list[tuple[int, float]]:
    """Return (child, seconds to reach) of each long recording: every fifth child, starting with one in validation."""
    count = max(2, round(minutes / MINUTES_PER_LONG))
    return [((1 + 5 * k) % children, SHORTEST_LONG_SEC + 3.0 * (k % 9)) for k in range(count)]


class Espeak:
    """Call espeak-ng through its C interface: synthesise a phrase, and return its pronunciation."""

    def __init__(self, library: Path, data_parent: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._chunks: list[bytes] = []
        self._callback = SYNTH_CALLBACK(self._collect)  # an attribute: espeak's C pointer keeps nothing alive
        data = os.fsencode(data_parent)
        rate = self.library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, INITIALIZE_DONT_EXIT)
        if rate != SAMPLE_RATE:
            raise DemoError(f"espeak-ng did not start: its sample rate must be {SAMPLE_RATE}, but is {rate}")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else its breath noise is seeded by the clock
        self.library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: int | None, count: int, _events: int | None) -> int:
        if samples is not None:
            self._chunks.append(ctypes.string_at(samples, count * 2))
        return 0  # continue

    def become(self, child: Speaker) -> None:
        self.library.espeak_SetVoiceByName(child.voice.encode())
        self.library.espeak_SetParameter(PARAMETER_PITCH, child.pitch, 0)
        self.library.espeak_SetParameter(PARAMETER_RATE, child.words_per_minute, 0)
        self.library.espeak_SetParameter(PARAMETER_WORDGAP, WORD_GAP, 0)

    def pronounce(self, phrase: str) -> str:
        """Return the IPA of a phrase without punctuation, each word in its context, in espeak's symbols."""
        text = ctypes.c_char_p(phrase.encode())
        ipa: bytes = self.library.espeak_TextToPhonemes(ctypes.byref(text), CHARS_UTF8, PHONEMES_IPA)
        return ipa.decode()

    def speak(self, phrase: str) -> Samples:
        """Return the samples of a phrase without the silence around it."""
        self._chunks.clear()
        text = phrase.encode()
        size = ctypes.c_size_t(len(text) + 1)
        # Without the end pause espeak stops before the echo of the last phone has ended.
        self.library.espeak_Synth(text, size, 0, 0, 0, CHARS_UTF8 | ENDPAUSE, None, None)
        samples = np.frombuffer(b"".join(self._chunks), np.int16)
        audible = np.flatnonzero(np.abs(samples.astype(np.int32)) > 100)  # 0.3 % of full scale
        return samples[audible[0] : audible[-1] + 1]


@contextmanager
def open_espeak() -> Iterator[Espeak]:
    """Yield espeak-ng of the package espeakng-loader in its initial state.

    Its flutter and noise continue from phrase to phrase in static variables. So a new copy of the library is loaded,
    and the second corpus of a process equals the first. The data are reached by a link beside the copy, because
    espeak keeps their path in a short buffer (160 bytes).
    """
    try:
        loader = importlib.import_module("espeakng_loader")
    except ImportError as error:
        raise DemoError("the demo corpus needs the package espeakng-loader", "pip install espeakng-loader") from error
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="espeak-"))
            library = Path(shutil.copy(loader.get_library_path(), folder))
            (Path(folder) / "espeak-ng-data").symlink_to(loader.get_data_path())
        except OSError as error:
            place = Path(tempfile.tempdir or os.environ.get("TMPDIR", "/tmp"))
            raise write_error(place, error, hint="make room there, or set TMPDIR to another folder") from error
        espeak = Espeak(library, Path(folder))
        yield espeak
        espeak.library.espeak_Terminate()


def challenge_spelling(ipa: str) -> str:
    """Convert espeak's IPA to the challenge's alphabet. Raises DemoError for an unknown symbol; none is dropped."""
    symbols = NEXT_PHONE.findall(ipa)
    unknown = "".join(symbol for symbol in symbols if symbol not in PHONES)
    if unknown:
        raise DemoError(f"espeak-ng returned {ipa!r}, but {unknown!r} has no spelling", "see PHONES in synthetic.py")
    return "".join(PHONES[symbol] for symbol in symbols)


def record_child(
    espeak: Espeak, child: Speaker, long_targets: Sequence[float], short_sec: float, out: Path, seed: int
) -> Iterator[DemoRow]:
    """Write a child's short clips until they last `short_sec` in total, then its long recordings; yield their rows."""
    rng = np.random.default_rng([seed, child.number])
    espeak.become(child)
    spoken_sec, pending = 0.0, list(long_targets)
    for number in itertools.count():
        is_short = spoken_sec < short_sec
        if not is_short and not pending:
            return
        speech, text = say_phrase(espeak, rng) if is_short else say_at_length(espeak, rng, pending.pop(0))
        row = write_clip(room_sound(speech, child, rng), text, child, number, out, seed)
        spoken_sec += row.audio_duration_sec
        yield row


def say_phrase(espeak: Espeak, rng: np.random.Generator) -> tuple[Samples, str]:
    """Return the samples and the label of a phrase of one to five words."""
    count = 1 + rng.choice(len(PHRASE_SHARES), p=PHRASE_SHARES)
    words = rng.choice(VOCABULARY.split(), count, replace=False)
    phrase = " ".join(words)
    text = challenge_spelling(espeak.pronounce(phrase))
    if len(text.split()) != count:
        raise DemoError(f"{phrase!r} has {count} words, but espeak-ng's label for it is {text!r}")
    return espeak.speak(phrase), text


def say_at_length(espeak: Espeak, rng: np.random.Generator, target_sec: float) -> tuple[Samples, str]:
    """Return the samples and the label of phrases, 0.6 to 1.5 s apart, that together reach `target_sec`."""
    speech, text = say_phrase(espeak, rng)
    parts, texts = [speech], [text]
    while sum(map(len, parts)) < target_sec * SAMPLE_RATE:
        speech, text = say_phrase(espeak, rng)
        parts += [silence(rng.uniform(0.6, 1.5)), speech]
        texts.append(text)
    return np.concatenate(parts), " ".join(texts)


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE), np.int16)


def room_sound(speech: Samples, child: Speaker, rng: np.random.Generator) -> Samples:
    """Return the speech at a random level, with margins of 0.1 to 0.3 s and the room's noise, also in every pause."""
    framed = np.concatenate([silence(rng.uniform(0.1, 0.3)), speech, silence(rng.uniform(0.1, 0.3))])
    signal = framed.astype(np.float32) / np.abs(speech.astype(np.float32)).max()
    signal *= rng.uniform(0.3, 0.7) * 32767  # headroom: the noise on top never clips
    loudness = np.sqrt(np.mean(np.square(signal[framed != 0])))
    noise = rng.standard_normal(len(signal), np.float32) * (loudness * 10 ** (-child.snr_db / 20))
    sound: Samples = np.rint(signal + noise).astype(np.int16)
    return sound


def write_clip(sound: Samples, text: str, child: Speaker, number: int, out: Path, seed: int) -> DemoRow:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    row = DemoRow(
        utterance_id=derive_id("U", seed, child.number, number),
        child_id=child.child_id,
        session_id=derive_id("S", seed, child.number, number // SESSION_CLIPS),
        audio_path="",
        audio_duration_sec=round(len(sound) / SAMPLE_RATE, 3),
        age_bucket=child.age_bucket,
        md5_hash="",
        filesize_bytes=0,
        phonetic_text=text,
    )
    return store_audio(row, buffer.getvalue(), out / child.corpus)


def write_header_only(row: DemoRow, folder: Path, seed: int) -> DemoRow:
    """Write a copy of a clip cut off where its audio frames begin; header and row still declare the whole."""
    flac = (folder / row.audio_path).read_bytes()
    header_only = replace(row, utterance_id=derive_id("U", seed, "header only"))
    return store_audio(header_only, flac[: end_of_blocks(flac)], folder)


def store_audio(row: DemoRow, flac: bytes, folder: Path) -> DemoRow:
    """Write an audio file; return its row with the path, size and checksum of these bytes."""
    audio_path = f"audio/{row.utterance_id}.flac"
    with explaining(folder / audio_path, len(flac)):  # the manifest is written last, and names only whole files
        (folder / audio_path).write_bytes(flac)
    checksum = hashlib.md5(flac, usedforsecurity=False).hexdigest()
    return replace(row, audio_path=audio_path, md5_hash=checksum, filesize_bytes=len(flac))


def write_manifest(folder: Path, rows: Sequence[DemoRow]) -> None:
    """Write the manifest, after all audio, so that it never names a missing file."""
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    write(folder / "train_phon_transcripts.jsonl", lines)
