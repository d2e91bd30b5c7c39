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
SUFFIXES = ("wav", "wav.wav", "txt", "phn")  # the second: a RIFF copy beside the SPHERE file, or in its place
DIALECT = re.compile("dr[1-8]")
WORDS, PHONE = (re.compile(rf"(\d{{1,9}})\s+(\d{{1,9}})\s+({label})") for label in (r"\S.*", r"\S+"))
SHARED = "sa"  # prefix of two sentences that everybody reads, in training and in test


def matches(location: Path) -> bool:
    return _top(location) is not None


def read(location: Path, options: ManifestOptions) -> Iterator[PlacedRow]:
    """Yield a row for each sentence: its words as written, or its phones. Raises ManifestError."""
    phones = options.labels == "phones"
    for split, dialect, folder in _speakers(location):
        speaker = folder.name.upper()
        for sentence, files in _sentences(folder, options.include_sa).items():
            label = files.get("phn" if phones else "txt")
            if label is None:
                raise _missing(folder / sentence, phones)
            audio = files.get("wav") or files.get("wav.wav") or label.with_suffix(".WAV")
            number, text = _read_phones(label) if phones else _read_words(label)
            row = {
                "utterance_id": f"{speaker}_{sentence}",
                "audio_path": audio.relative_to(location).as_posix(),
                "text": text,
                "child_id": speaker,
                "session_id": dialect,
                "split": split,
                "subcorpus": "core test" if split == "test" and speaker in CORE else "",
            }
            yield PlacedRow(str(label), number, row)


def _speakers(location: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield the split, the dialect and the folder of each speaker."""
    top = _top(location)
    for part in _parts(top) if top else ():
        for dialect in _folders(part, DIALECT):
            for folder in _folders(dialect):
                held_out = "valid" if folder.name.upper() in DEVELOPMENT else "test"
                yield "train" if part.name.lower() == "train" else held_out, dialect.name.upper(), folder


def _top(location: Path) -> Path | None:
    """Return the folder of TRAIN and TEST: this one, or its TIMIT/ or data/, as copies of the disc have it."""
    if not location.is_dir():
        return None
    candidates = [location, *_folders(location, re.compile("timit|data"))]
    return next((top for top in candidates if any(_folders(part, DIALECT) for part in _parts(top))), None)


def _parts(top: Path) -> list[Path]:
    return _folders(top, re.compile("train|test"))


def _folders(folder: Path, name: re.Pattern[str] = re.compile(".*")) -> list[Path]:
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name.lower()) and path.is_dir())


def _sentences(speaker: Path, include_sa: bool) -> dict[str, Mapping[str, Path]]:
    """Return the files of each sentence of a speaker by their suffix."""
    found = defaultdict[str, dict[str, Path]](dict)
    for path in sorted(speaker.iterdir()):
        stem, _, suffix = path.name.lower().partition(".")
        if stem and suffix in SUFFIXES and (include_sa or not stem.startswith(SHARED)):
            found[stem.upper()][suffix] = path
    return dict(sorted(found.items()))


def _read_words(path: Path) -> tuple[int, str]:
    """Return the line and the sentence of a .TXT file, as it is written there."""
    lines = list(read_text(path))
    if len(lines) != 1:
        raise ManifestError(f"{path}: {len(lines)} lines with text, one is expected: its times and the sentence")
    return lines[0][0], _parse(path, *lines[0], WORDS)[2]


def _read_phones(path: Path) -> tuple[int, str]:
    """Return the first line and the phones of a .PHN file, separated by blanks."""
    phones, before = list[str](), 0
    for number, line in read_text(path):
        start, _, phone = _parse(path, number, line, PHONE)
        if start < before:
            raise ManifestError(f"{path}:{number}: begins at sample {start}, the phone before it at {before}")
        before = start
        phones.append(phone)
    if not phones:
        raise ManifestError(f"{path}: there is no phone in it")
    return 1, " ".join(phones)


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
