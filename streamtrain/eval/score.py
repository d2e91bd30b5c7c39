"""Compute CER or WER between two files in the submission format, as the challenge does. Imports no torch."""

from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from sharding.errors import StreamtrainError, counted
from sharding.files.document import LARGE_BYTES, DocumentError, open_regular, parse_json, read_document
from sharding.files.names import canonical_name
from sharding.labels.policy import LabelPolicy, policy_of
from sharding.labels.profiles import PROFILES
from sharding.labels.units import Units
from streamtrain.eval.metrics import TextEdits

RUN_HINT = "these hypotheses are already scored: see scorecard.json in the same folder, or run `summary RUN`"
LISTED = 10  # ids listed in an error message


class ScoreError(StreamtrainError):
    """Report two files that cannot be compared."""


def score_files(predicted: Path, actual: Path, labels: LabelPolicy | None = None) -> dict[str, Any]:
    """Return the corpus-level error rates over the ids of `actual`, and the edits of the first of them, the official.

    That is the WER of profile english, the PER of units other than characters, else the CER. Without `labels`, the
    profile is that which `predicted` names, or of its field: phonetic_text, orthographic_text or text. Raises
    ScoreError if ids are missing, surplus or duplicated.
    """
    labels = labels or _labels_of(predicted)
    hypotheses, references = _read(predicted, labels.field), _read(actual, labels.field)
    if not references:
        raise ScoreError(f"{actual}: the file has no rows", f"give rows with utterance_id and {labels.field}")
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
    pairs = ((text, hypotheses[name]) for name, text in references.items())
    edits = sum((TextEdits.of(*pair, labels) for pair in pairs), TextEdits())
    by_metric = {"wer": edits.words} if labels.profile == "english" else {}
    by_metric |= {labels.metric: edits.symbols, "cer": edits.characters, "wer": edits.words}
    total = next(iter(by_metric.values()))
    return {
        **{name: counts.rate for name, counts in by_metric.items()},
        **({"wer_plain": edits.plain_words.rate} if edits.plain_words != edits.words else {}),
        "edits": total.edits,
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "reference_length": total.reference_length,
        "clips": len(references),
        "profile": labels.profile,
    }


def render(result: dict[str, Any]) -> str:
    metric = next(iter(result))
    unit = {"wer": "words", "cer": "characters", "per": "symbols"}[metric]
    others = ", ".join(f"{name.upper()} {result[name]:.6f}" for name in ("wer", "per", "cer")
                       if name != metric and name in result)  # fmt: skip
    return (
        f"{metric.upper()} {result[metric]:.6f}: {result['edits']:,} edits ({result['substitutions']:,} substitutions, "
        f"{result['deletions']:,} deletions, {result['insertions']:,} insertions) ÷ "
        f"{result['reference_length']:,} {unit}, {result['clips']:,} clips\n{others}; profile {result['profile']}"
    )


def _labels_of(predicted: Path) -> LabelPolicy:
    """Return the policy that the first row names, as `transcribe` does, else that of the field of its label."""
    with suppress(OSError), open_regular(predicted) as lines:
        for line in lines:
            with suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict) and isinstance(row.get("profile"), str):
                    return policy_of(row["profile"], row["units"] if row.get("units") in get_args(Units) else None)
                for profile in ("pasketti", "english", "text"):
                    if isinstance(row, dict) and PROFILES[profile].field in row:
                        return policy_of(profile)
    return policy_of("pasketti")


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
