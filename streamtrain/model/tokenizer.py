"""Read the vocabulary of a model from its tokenizer's files, as Transformers has written them since 2020; write them.

The token of id i is output i of the head. Outputs without a token, which some published heads have, are never written.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError, reason_of
from sharding.files.document import Count, DocumentError, parse, parse_json, read_document, validate
from streamtrain.model.vocab import BLANK, SPACE, UNKNOWN, Vocab

MAX_UNUSED = 8  # outputs without a token: some heads are padded to a multiple of eight
PHONEMES = "Wav2Vec2PhonemeCTCTokenizer"  # its labels are blank-separated tokens
_IDS, _OBJECT = TypeAdapter(dict[str, Count]), TypeAdapter(dict[str, Any])


def load_vocab(folder: Path) -> Vocab:
    """Return the vocabulary of a model's folder. Raises StreamtrainError if its files are not valid."""
    return read_vocab(folder.joinpath, str(folder / "vocab.json"))


def read_vocab(find: Callable[[str], Path | None], place: str) -> Vocab:
    """Return the vocabulary of the tokenizer's files that `find` returns; `place` names it in an error."""
    try:
        ids = _read_ids(find)
        settings = _read_object(find("special_tokens_map.json")) | _read_object(find("tokenizer_config.json"))
    except (OSError, ValueError) as error:
        raise StreamtrainError(
            f"{place}: no vocabulary ({reason_of(error)})", "give the folder of a trained model, such as RUN/best"
        ) from error
    if sorted(ids.values()) != sorted(set(ids.values())) or max(ids.values(), default=0) > len(ids) + MAX_UNUSED:
        raise StreamtrainError(f"{place}: ids must run from 0, each of one token")
    by_id = {number: token for token, number in ids.items()}
    tokens = tuple(by_id.get(number, "") for number in range(max(by_id, default=-1) + 1))
    blank = _special(settings, "pad_token", tokens, (BLANK, "<pad>"))
    if blank is None:
        raise StreamtrainError(f"{place}: has no padding token, such as {BLANK} or <pad>, which is CTC's blank")
    phonemes = settings.get("tokenizer_class") == PHONEMES
    delimiter = _special(settings, "word_delimiter_token", tokens, () if phonemes else (SPACE,))
    unknown = _special(settings, "unk_token", tokens, (UNKNOWN, "<unk>"))
    edges = (_special(settings, "bos_token", tokens, ("<s>",)), _special(settings, "eos_token", tokens, ("</s>",)))
    unwritten = tuple(token for token in dict.fromkeys(edges) if token not in (None, blank, unknown))
    if phonemes:
        unwritten, delimiter = (*unwritten, *filter(None, [delimiter])), None
    vocab = Vocab(tokens, blank, unknown, delimiter, unwritten, "tokens" if phonemes else "characters")
    folds = settings.get("do_lower_case") is True
    return replace(vocab, case="upper", writes="lower") if folds else vocab


def fit_to_head(vocab: Vocab, outputs: int) -> Vocab | None:
    """Return a vocabulary with as many ids as a head has outputs; None if they are not of one model."""
    spare = outputs - len(vocab)
    cut = vocab.tokens[outputs:] if spare < 0 else ()
    if spare > MAX_UNUSED or not set(cut) <= {"", *vocab.unwritten}:  # <s> and </s> may be listed, and never output
        return None
    unwritten = tuple(token for token in vocab.unwritten if token not in cut)
    return replace(vocab, tokens=vocab.tokens[:outputs] + ("",) * spare, unwritten=unwritten)


def _read_ids(find: Callable[[str], Path | None]) -> dict[str, int]:
    path = find("vocab.json")
    if path is None:
        raise DocumentError("there is none")
    ids = parse_json(read_document(path))
    if isinstance(ids, dict) and ids and all(isinstance(entry, dict) for entry in ids.values()):
        raise DocumentError(f"it has one for each language: {', '.join(list(ids)[:5])}, …")
    added = find("added_tokens.json")
    more = parse(read_document(added), _IDS) if added is not None and added.is_file() else {}
    return more | validate(ids, _IDS)


def _read_object(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    return parse(read_document(path), _OBJECT)


def _special(settings: Mapping[str, Any], name: str, tokens: tuple[str, ...], usual: tuple[str, ...]) -> str | None:
    """Return a special token by its name in a tokenizer's settings, or if that is not set, the usual one."""
    token = settings.get(name, usual)
    named = (token.get("content") if isinstance(token, dict) else token,) if name in settings else usual
    return next((each for each in named if isinstance(each, str) and each and each in tokens), None)


def save_vocab(vocab: Vocab, folder: Path, do_normalize: bool, attention_mask: bool) -> None:
    """Write the tokenizer and feature extractor with which Transformers' ASR pipeline runs the model.

    They are saved apart: Transformers 4 does not read the common processor_config.json.
    """
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2PhonemeCTCTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.json"
    ids = {token: i for i, token in enumerate(vocab.tokens) if token}
    path.write_text(json.dumps(ids, ensure_ascii=False, indent=1), encoding="utf-8")
    special: dict[str, Any] = {
        "bos_token": "<s>" if "<s>" in vocab.unwritten else None,
        "eos_token": "</s>" if "</s>" in vocab.unwritten else None,
        "unk_token": vocab.unknown_token,
        "pad_token": vocab.blank_token,
        "word_delimiter_token": vocab.delimiter,
        "clean_up_tokenization_spaces": False,
    }
    if vocab.units == "tokens":
        tokenizer = Wav2Vec2PhonemeCTCTokenizer(str(path), phone_delimiter_token=" ", do_phonemize=False, **special)
    else:
        tokenizer = Wav2Vec2CTCTokenizer(str(path), do_lower_case=vocab.writes == "lower", **special)
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        sampling_rate=SAMPLE_RATE, do_normalize=do_normalize, return_attention_mask=attention_mask
    ).save_pretrained(folder)
