"""Compute CER or WER between two files in the submission format, as the challenge does. Imports no torch."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from sharding.errors import StreamtrainError, counted
from sharding.files.document import LARGE_BYTES, DocumentError, open_regular, parse_json, read_document
from sharding.files.names import canonical_name
from sharding.labels.ipa import TRACKS, normalize_ipa
from streamtrain.eval.metrics import spoken_words, sum_edits

RUN_HINT = "these hypotheses are already scored: see scorecard.json in the same folder, or run `summary RUN`"
LISTED = 10  # ids listed in an error message


class ScoreError(StreamtrainError):
    """Report two files that cannot be compared."""


def score_files(predicted: Path, actual: Path) -> dict[str, Any]:
    """Return the corpus-level CER over the ids of `actual`, or the WER if `predicted` is of the word track.

    Raises ScoreError if ids are missing, surplus or duplicated.
    """
    track = _track_of(predicted)
    hypotheses, references = _read(predicted, TRACKS[track]), _read(actual, TRACKS[track])
    if not references:
        raise ScoreError(f"{actual}: the file has no rows", f"give rows with utterance_id and {TRACKS[track]}")
    faults = [
        f"{problem} {counted(len(ids), 'id')}: {', '.join(sorted(ids)[:LISTED])}{', …' if len(ids) > LISTED else ''}"
        for problem, ids in (
            ("has no row for", references.keys() - hypotheses.keys()),
            ("has extra rows for", hypotheses.keys() - references.keys()),
        )
        if ids
    ]
    if faults:
        raise ScoreError(f"{predicted}: {'; '.join(faults)}", f"give each clip of {actual} exactly one row")
    compared = spoken_words if track == "word" else normalize_ipa
    total = sum_edits(references.values(), (hypotheses[name] for name in references), compared)
    return {
        "wer" if track == "word" else "cer": total.rate,
        "edits": total.edits,
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "reference_length": total.reference_length,
        "clips": len(references),
    }


def render(result: dict[str, Any]) -> str:
    rate, unit = ("WER", "words") if "wer" in result else ("CER", "symbols")
    return (
        f"{rate} {result[rate.lower()]:.6f}: {result['edits']:,} edits ({result['substitutions']:,} substitutions, "
        f"{result['deletions']:,} deletions, {result['insertions']:,} insertions) ÷ "
        f"{result['reference_length']:,} {unit}, {result['clips']:,} clips"
    )


def _track_of(predicted: Path) -> str:
    """Return the track of the first row that has a label of any track; "phonetic" if there is none."""
    with suppress(OSError), open_regular(predicted) as lines:
        for line in lines:
            with suppress(ValueError):
                row = parse_json(line)
                for track, name in TRACKS.items():
                    if isinstance(row, dict) and name in row:
                        return track
    return "phonetic"


def _read(path: Path, label: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    try:
        lines = read_document(path, LARGE_BYTES).split(b"\n")
    except OSError as error:
        raise ScoreError(f"{path}: {error.strerror}") from error
    except DocumentError as error:
        raise ScoreError(f"{path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        problem = f"{path}:{number}: not a row with utterance_id and {label}"
        try:
            row = parse_json(line)
            utterance_id, text = row["utterance_id"], row[label]
            if not isinstance(utterance_id, str) or not isinstance(text, str | None):
                raise TypeError("these are not text")
        except KeyError as error:
            hint = RUN_HINT if "hypothesis" in row else None
            raise ScoreError(f"{problem}: it has {', '.join(row)}", hint) from error
        except (ValueError, TypeError) as error:
            raise ScoreError(f"{problem} ({error})", "one JSON object per line") from error
        name = canonical_name(utterance_id)
        if name in texts:
            raise ScoreError(f"{path}:{number}: utterance_id {utterance_id!r} occurs twice")
        texts[name] = text or ""
    return texts
