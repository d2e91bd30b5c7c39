"""CER between two files in the submission's form, as the challenge scores it. Starts without torch."""

import json
from pathlib import Path
from typing import Any

from sharding.errors import StreamtrainError
from sharding.ipa import normalize_ipa
from streamtrain.metrics import EditCounts, count_edits

LISTED = 10  # ids named in a message


class ScoreError(StreamtrainError):
    """Two files that cannot be compared."""


def score_files(predicted: Path, actual: Path) -> dict[str, Any]:
    """Corpus-level CER over the ids of `actual`. Raises ScoreError where ids are missing, surplus or double."""
    hypotheses, references = _read(predicted), _read(actual)
    if not references:
        raise ScoreError(f"{actual}: the file has no rows", "it holds the labels: utterance_id and phonetic_text")
    for what, ids in (
        ("has no row for", references.keys() - hypotheses.keys()),
        ("has surplus", hypotheses.keys() - references.keys()),
    ):
        if ids:
            named = ", ".join(sorted(ids)[:LISTED])
            raise ScoreError(f"{predicted}: {what} {len(ids)} ids: {named}{', …' if len(ids) > LISTED else ''}")
    pairs = ((normalize_ipa(text), normalize_ipa(hypotheses[name])) for name, text in references.items())
    total = sum((count_edits(reference, hypothesis) for reference, hypothesis in pairs), EditCounts())
    return {
        "cer": total.cer,
        "edits": total.edits,
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "reference_length": total.reference_length,
        "clips": len(references),
    }


def render(result: dict[str, Any]) -> str:
    return (
        f"CER {result['cer']:.6f}: {result['edits']:,} edits ({result['substitutions']:,} substitutions, "
        f"{result['deletions']:,} deletions, {result['insertions']:,} insertions) ÷ "
        f"{result['reference_length']:,} symbols, {result['clips']:,} clips"
    )


def _read(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ScoreError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}: not a row with utterance_id and phonetic_text"
        try:
            row = json.loads(line)
            name, text = row["utterance_id"], row["phonetic_text"]
            if not isinstance(name, str) or not isinstance(text, str | None):
                raise TypeError("they are not text")
        except KeyError as error:
            raise ScoreError(f"{where}: it has {', '.join(row)}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise ScoreError(f"{where} ({error})", "one JSON object per line") from error
        if name in texts:
            raise ScoreError(f"{path}:{number}: utterance_id {name!r} comes twice")
        texts[name] = text or ""
    return texts
