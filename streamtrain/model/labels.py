"""Compare what a model outputs with labels: the case and the share of their symbols that its vocabulary covers.

The label policy of a trained model lies in its folder, as labels.json; that of a published model is not known.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from sharding.errors import StreamtrainError, reason_of
from sharding.files.document import STRICT, DocumentError, Size, parse, read_document
from sharding.files.writing import write_inside
from sharding.labels.policy import MAX_FOREIGN, LabelPolicy, policy_of
from sharding.labels.profiles import PROFILES
from sharding.labels.units import Units
from streamtrain.model.ctc import CTCModel
from streamtrain.model.vocab import CHANGE_CASE, Case, Vocab, vocab_of

LABELS_NAME = "labels.json"
MAX_LACKING = 0.001  # share of the labels' symbols that one symbol may have, and yet have no token
_OURS = ("pasketti", "english")  # profiles of the models that were saved without labels.json


class _Labels(TypedDict):
    """Describe labels.json."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    profile: str
    units: Units
    symbols: list[str]
    counts: list[Size]
    digest: str


_LABELS = TypeAdapter(_Labels)


@dataclass(frozen=True)
class Fit:
    """Hold a vocabulary in the units and the case of some labels, and the labels' symbols that it lacks."""

    vocab: Vocab
    share: float  # of the labels' symbols that have a token
    lacking: tuple[str, ...]
    reason: str  # why the vocabulary does not serve these labels; "" if it does


def fit_vocab(vocab: Vocab, policy: LabelPolicy) -> Fit:
    """Return how a vocabulary serves labels: symbols are folded to its case if it has one and that finds more of them.

    Symbols count as often as they occur in the training labels, if that is known, else each once. A symbol that makes
    up a thousandth of the labels, as a German ß, must be there: the model could never write it.
    """
    if policy.units == "tokens" and vocab.delimiter is not None:
        vocab = replace(vocab, delimiter=None, unwritten=(*vocab.unwritten, vocab.delimiter))
    exact = replace(vocab, units=policy.units, case="", writes="")
    case, written = case_of(list(exact.written.values())), case_of(policy.symbols)
    folded = replace(exact, case=case, writes="" if written == case else written)
    fitted = folded if _share(folded, policy) > _share(exact, policy) else exact
    share, lacking = _share(fitted, policy), tuple(symbol for symbol in policy.symbols if not _has(fitted, symbol))
    counts = dict(zip(policy.symbols, policy.counts, strict=False))
    common = [symbol for symbol in lacking if counts.get(symbol, 0) > MAX_LACKING * sum(policy.counts)]
    reason = ""
    if common:
        reason = f"it lacks {policy.name(common)}, which the labels have often" + _other_case(fitted, common)
    elif share < 1 - MAX_FOREIGN:
        reason = f"it has {share:.1%} of the labels' symbols, at least {1 - MAX_FOREIGN:.0%} are needed; it lacks "
        reason += policy.name(lacking) + _other_case(fitted, lacking)
    elif policy.units != "tokens" and vocab.delimiter is None:
        reason = "it has no token between words"
    return Fit(fitted, share, lacking, reason)


def case_of(symbols: Sequence[str]) -> Case:
    """Return the case of all letters that have one; "" if they differ."""
    cased = [symbol for symbol in symbols if symbol.lower() != symbol.upper()]
    cases: tuple[Case, ...] = ("lower", "upper")
    return next((case for case in cases if cased and all(CHANGE_CASE[case](each) == each for each in cased)), "")


def _has(vocab: Vocab, symbol: str) -> bool:
    """Return whether a symbol has a token, and comes out as it went in: not if its case is lost, as of a Turkish ı."""
    number = vocab.ids.get(symbol, vocab.ids.get(CHANGE_CASE[vocab.case](symbol)))
    return number is not None and vocab.decode([number]) == symbol.strip()


def _share(vocab: Vocab, policy: LabelPolicy) -> float:
    counts = policy.counts or (1,) * len(policy.symbols)
    known = sum(count for symbol, count in zip(policy.symbols, counts, strict=True) if _has(vocab, symbol))
    return known / sum(counts) if counts else 1.0  # a set for scoring alone has no alphabet


def _other_case(vocab: Vocab, lacking: Sequence[str]) -> str:
    found = [symbol.swapcase() for symbol in lacking if symbol.swapcase() in vocab.ids]
    return f"; it has {' '.join(found[:12])}, in the other case" if found else ""


def check_symbols(vocab: Vocab, labels: Sequence[str]) -> str | None:
    """Return the symbols without a token if they are more than 5 % of all symbols of these labels; else None."""
    symbols = [symbol for label in labels for symbol in vocab.split(label) if symbol != " "]
    lacking = [symbol for symbol in symbols if not _has(vocab, symbol)]
    if len(lacking) <= MAX_FOREIGN * len(symbols):
        return None
    named = tuple(dict.fromkeys(lacking))
    return f"{len(lacking) / len(symbols):.1%} of the labels' symbols have no token in the model's vocabulary: " + (
        LabelPolicy().name(named) + _other_case(vocab, named)
    )


def take_labels(model: CTCModel, policy: LabelPolicy) -> None:
    """Check that a model outputs labels of this policy; a published one, whose labels are not known, takes them on.

    Raises StreamtrainError if its labels are of another profile or of other units, or if its vocabulary lacks more than
    5 % of their symbols.
    """
    if model.labels is None:
        fit = fit_vocab(model.vocab, policy)
        if fit.reason:
            raise StreamtrainError(
                f"the model's vocabulary is not of labels of {describe(policy)}: {fit.reason}",
                "build the shard set with another --profile or other --units, or take another model",
            )
        model.vocab, model.labels = fit.vocab, policy
    elif (model.labels.profile, model.labels.units) != (policy.profile, policy.units):
        raise StreamtrainError(
            f"the model writes {describe(model.labels)}, the labels are of {describe(policy)}",
            "build the shard set with the model's --profile and --units, or take another model",
        )
    elif "" not in (model.labels.digest, policy.digest) and model.labels.digest != policy.digest:
        raise StreamtrainError(
            f"profile {policy.profile!r} gave other texts when the model's labels were made than when these were",
            "build the shard set again with the function that the model was trained with",
        )
    elif _share(model.vocab, policy) < 1 - MAX_FOREIGN:
        lacking = tuple(symbol for symbol in policy.symbols if not _has(model.vocab, symbol))
        raise StreamtrainError(
            f"the model writes another alphabet: it has {_share(model.vocab, policy):.1%} of the labels' symbols, and "
            f"lacks {policy.name(lacking)}",
            "take a model that was trained on labels of this language",
        )


def describe(policy: LabelPolicy) -> str:
    """Return the profile and the units of labels, for messages."""
    return f"profile {policy.profile} in {policy.units}"


def save_labels(policy: LabelPolicy, folder: Path) -> None:
    """Write the label policy of a model to its folder."""
    write_inside(folder / LABELS_NAME, json.dumps(policy.document(), ensure_ascii=False, indent=1))


def read_labels(folder: Path, vocab: Vocab) -> LabelPolicy | None:
    """Return the label policy of a model; None if it is not known, as of a published model.

    A model without labels.json whose vocabulary is that of a profile with a fixed alphabet is of that profile. The
    profile is not looked up: its name may be that of a function, and whoever made the model chose it. Raises
    StreamtrainError if the file is not valid.
    """
    path = folder / LABELS_NAME
    try:
        found = parse(read_document(path), _LABELS)
        if len(found["counts"]) not in (0, len(found["symbols"])):
            raise DocumentError(f"it has {len(found['symbols'])} symbols and {len(found['counts'])} counts")
    except FileNotFoundError:
        return next((ours for ours in map(policy_of, _OURS) if vocab_of(ours) == vocab), None)
    except (OSError, DocumentError) as error:
        raise StreamtrainError(f"{path}: {reason_of(error)}", "copy the model again") from error
    symbols, counts = tuple(found["symbols"]), tuple(found["counts"])
    return LabelPolicy(found["profile"], found["units"], symbols, counts, found["digest"])


def field_of(policy: LabelPolicy | None) -> str:
    """Return the field of the text in transcripts: "text" if the labels are not of a profile of this package."""
    return policy.field if policy is not None and policy.profile in PROFILES else "text"
