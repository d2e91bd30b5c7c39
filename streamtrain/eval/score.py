"""CER or WER between two files in the submission's form, as the challenge scores it. Starts without torch."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from sharding.errors import StreamtrainError, counted
from sharding.files.document import LARGE_BYTES, DocumentError, open_regular, parse_json, read_document
from sharding.files.names import canonical_name
from sharding.labels.ipa import TRACKS, normalize_ipa
from streamtrain.eval.metrics import EditCounts, count_edits, spoken_words

RUN_HINT = "these are hypotheses that are scored already: scorecard.json beside them, or `summary RUN`, tells the score"
LISTED = 10  # ids named in a message


class ScoreError(StreamtrainError):
    """Two files that cannot be compared."""


def score_files(predicted: Path, actual: Path) -> dict[str, Any]:
    """Corpus-level CER over the ids of `actual`, or WER where `predicted` is of the word track.

    Raises ScoreError where ids are missing, surplus or double.
    """
    track = _track_of(predicted)
    hypotheses, references = _read(predicted, TRACKS[track]), _read(actual, TRACKS[track])
    if not references:
        raise ScoreError(f"{actual}: the file has no rows", f"it holds the labels: utterance_id and {TRACKS[track]}")
    faults = [
        f"{what} {counted(len(ids), 'id')}: {', '.join(sorted(ids)[:LISTED])}{', …' if len(ids) > LISTED else ''}"
        for what, ids in (
            ("has no row for", references.keys() - hypotheses.keys()),
            ("has surplus", hypotheses.keys() - references.keys()),
        )
        if ids
    ]
    if faults:
        raise ScoreError(f"{predicted}: {'; '.join(faults)}", f"a score is over every clip of {actual}, each once")
    compared = spoken_words if track == "word" else normalize_ipa
    pairs = ((compared(text), compared(hypotheses[name])) for name, text in references.items())
    total = sum((count_edits(reference, hypothesis) for reference, hypothesis in pairs), EditCounts())
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
    """Told by the first row that has a label of either."""
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
        where = f"{path}:{number}: not a row with utterance_id and {label}"
        try:
            row = parse_json(line)
            written, text = row["utterance_id"], row[label]
            if not isinstance(written, str) or not isinstance(text, str | None):
                raise TypeError("they are not text")
        except KeyError as error:
            hint = RUN_HINT if "hypothesis" in row else None
            raise ScoreError(f"{where}: it has {', '.join(row)}", hint) from error
        except (ValueError, TypeError) as error:
            raise ScoreError(f"{where} ({error})", "one JSON object per line") from error
        name = canonical_name(written)
        if name in texts:
            raise ScoreError(f"{path}:{number}: utterance_id {written!r} comes twice")
        texts[name] = text or ""
    return texts
