"""Read TIMIT: `{TRAIN,TEST}/DR1…DR8/<speaker>/<sentence>.WAV`, with .TXT, .PHN and .WRD beside it, in any case.

TRAIN is `train`. TEST is divided by speaker as in Kaldi's recipe, so that error rates are comparable: its 50 speakers
for development (400 sentences) are `valid`, all others `test`. The 24 of the core test (192 sentences), whose results
are published, are a group of their own in a scorecard. `valid` and `test` together are the complete test (1,344).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from sharding.errors import ManifestError
from sharding.sources.options import ManifestOptions
from sharding.sources.tables import PlacedRow, read_text

_DEVELOPMENT = """
FAKS0 FDAC1 FJEM0 MGWT0 MJAR0 MMDB1 MMDM2 MPDF0 FCMH0 FKMS0 MBDG0 MBWM0 MCSH0 FADG0 FDMS0 FEDW0 MGJF0 MGLB0 MRTK0
MTAA0 MTDT0 MTHC0 MWJG0 FNMR0 FREW0 FSEM0 MBNS0 MMJR0 MDLS0 MDLF0 MDVC0 MERS0 FMAH0 FDRW0 MRCS0 MRJM4 FCAL1 MMWH0
FJSJ0 MAJC0 MJSW0 MREB0 FGJD0 FJMG0 MROA0 MTEB0 MJFC0 MRJR0 FMML0 MRWS1
"""  # egs/timit/s5/conf/dev_spk.list of kaldi-asr/kaldi
_CORE = """
MDAB0 MWBT0 FELC0 MTAS1 MWEW0 FPAS0 MJMP0 MLNT0 FPKT0 MLLL0 MTLS0 FJLM0 MBPM0 MKLT0 FNLP0 MCMJ0 MJDH0 FMGD0 MGRT0
MNJM0 FDHC0 MJLN0 MPAM0 FMLD0
"""  # of the disc's documentation: two men and a woman of each dialect
DEVELOPMENT, CORE = frozenset(_DEVELOPMENT.split()), frozenset(_CORE.split())
SUFFIXES = ("wav", "wav.wav", "txt", "phn", "wrd")  # the second: a RIFF copy beside the SPHERE file, or in its place
PART, DIALECT = re.compile("train|test"), re.compile("dr[1-8]")
SENTENCE, LABEL = (re.compile(rf"(\d{{1,9}})\s+(\d{{1,9}})\s+({label})") for label in (r"\S.*", r"\S+"))
RATE = 16_000  # samples a second, of all times on the disc
SHARED = "sa"  # prefix of two sentences that everybody reads, in training and in test


def matches(location: Path) -> bool:
    return _top(location) is not None


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield a row for each sentence: its text as written, or its phones; its words with times. Raises ManifestError."""
    phones = options.labels == "phones"
    for split, dialect, folder in _speakers(location):
        speaker = folder.name.upper()
        for sentence, files in _sentences(folder, options.include_sa).items():
            label = files.get("phn" if phones else "txt")
            if label is None:
                raise _missing(folder / sentence, phones)
            audio = files.get("wav") or files.get("wav.wav") or label.with_suffix(".WAV")
            number, text = _read_phones(label) if phones else _read_sentence(label)
            words = _read_labels(files["wrd"]) if "wrd" in files else []
            row = {
                "utterance_id": f"{speaker}_{sentence}",
                "audio_path": audio.relative_to(location).as_posix(),
                "text": text,
                "child_id": speaker,
                "session_id": dialect,
                "split": split,
                "subcorpus": "core test" if split == "test" and speaker in CORE else "",
                "words": [(word, start / RATE, end / RATE) for start, end, word in words],
            }
            yield PlacedRow(str(label), number, row)


def _speakers(location: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield the split, the dialect and the folder of each speaker."""
    top = _top(location)
    for name, part in _parts(top) if top else ():
        for dialect in _folders(part, DIALECT):
            for folder in _folders(dialect):
                held_out = "valid" if folder.name.upper() in DEVELOPMENT else "test"
                yield "train" if name == "train" else held_out, dialect.name.upper(), folder


def _top(location: Path) -> Path | None:
    """Return the folder of TRAIN and TEST, or one of these two: this one, or its TIMIT/ or data/, as in copies."""
    if not location.is_dir():
        return None
    candidates = [location, *_folders(location, re.compile("timit|data"))]
    return next((top for top in candidates if any(_folders(part, DIALECT) for _, part in _parts(top))), None)


def _parts(top: Path) -> list[tuple[str, Path]]:
    """Return TRAIN and TEST with their names in lower case: the folders of this one, or itself if it is one of them."""
    name = top.resolve().name.lower()
    if PART.fullmatch(name) and _folders(top, DIALECT):
        return [(name, top)]
    return [(part.name.lower(), part) for part in _folders(top, PART)]


def _folders(folder: Path, name: re.Pattern[str] = re.compile(".*")) -> list[Path]:
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name.lower()) and path.is_dir())


def left_out(options: ManifestOptions) -> str:
    """Return a pattern of audio that is left out: the SA sentences, and copies in another format."""
    shared = "" if options.include_sa else rf"|(.*/)?{SHARED}\d+\.wav"
    return rf"(?i)(.*\.wav\.wav{shared})"


def _sentences(speaker: Path, include_sa: bool) -> dict[str, Mapping[str, Path]]:
    """Return the files of each sentence of a speaker by their suffix."""
    found = defaultdict[str, dict[str, Path]](dict)
    for path in sorted(speaker.iterdir()):
        stem, _, suffix = path.name.lower().partition(".")
        if stem and suffix in SUFFIXES and (include_sa or not stem.startswith(SHARED)):
            found[stem.upper()][suffix] = path
    return dict(sorted(found.items()))


def _read_sentence(path: Path) -> tuple[int, str]:
    """Return the line and the sentence of a .TXT file, as it is written there."""
    lines = list(read_text(path))
    if len(lines) != 1:
        raise ManifestError(f"{path}: {len(lines)} lines with text, one is expected: its times and the sentence")
    return lines[0][0], _parse(path, *lines[0], SENTENCE)[2]


def _read_phones(path: Path) -> tuple[int, str]:
    """Return the first line and the phones of a .PHN file, separated by blanks."""
    phones = [phone for _, _, phone in _read_labels(path)]
    if not phones:
        raise ManifestError(f"{path}: there is no phone in it")
    return 1, " ".join(phones)


def _read_labels(path: Path) -> list[tuple[int, int, str]]:
    """Return start and end, in samples, and the label of each line of a .PHN or .WRD file."""
    labels, before = list[tuple[int, int, str]](), 0
    for number, line in read_text(path):
        labels.append(_parse(path, number, line, LABEL))
        if labels[-1][0] < before:
            raise ManifestError(f"{path}:{number}: begins at sample {labels[-1][0]}, the one before it at {before}")
        before = labels[-1][0]
    return labels


def _parse(path: Path, number: int, line: str, form: re.Pattern[str]) -> tuple[int, int, str]:
    """Return start and end, in samples at 16 kHz, and the label of a line."""
    match = form.fullmatch(line)
    if not match:
        raise ManifestError(f"{path}:{number}: {line[:80]!r}: start, end and label are expected, such as '0 2260 h#'")
    start, end = int(match[1]), int(match[2])
    if end < start:
        raise ManifestError(f"{path}:{number}: ends at sample {end}, before its start at {start}")
    return start, end, match[3]


def _missing(sentence: Path, phones: bool) -> ManifestError:
    suffix, other = (".PHN", "text") if phones else (".TXT", "phones")
    return ManifestError(
        f"{sentence}{suffix}: is missing, but other files of this sentence are there",
        f"copy it from the disc, or use the other labels: --labels {other}",
    )
