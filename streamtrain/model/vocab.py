"""Convert phones or letters to ids and back. The vocabulary is saved with the model, as Transformers' tokenizer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.labels.ipa import LETTERS, SYMBOLS

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError, reason_of

BLANK, UNKNOWN, SPACE = "[PAD]", "[UNK]", "|"  # the CTC blank is the tokenizer's padding token


@dataclass(frozen=True)
class Vocab:
    """Hold the tokens of a model; `tokens[i]` is the token of id i."""

    tokens: tuple[str, ...]

    @property
    def blank(self) -> int:
        return self.tokens.index(BLANK)

    @property
    def blank_inside(self) -> int:
        """Return the blank within a word: to CTC all blanks are the same."""
        return self.blank

    @property
    def space(self) -> int:
        return self.tokens.index(SPACE)

    @property
    def unknown(self) -> int:
        return self.tokens.index(UNKNOWN)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def track(self) -> str:
        """Return the track that the model outputs: phonetic if it has all phones, else word."""
        return "phonetic" if set(SYMBOLS) <= set(self.tokens) else "word"

    def encode(self, text: str) -> list[int]:
        """Return one id per symbol of a normalised label, so that its length is known without encoding it."""
        ids = self._ids()
        return [ids.get(SPACE if symbol == " " else symbol, ids[UNKNOWN]) for symbol in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of collapsed ids, without blank and unknown."""
        text = "".join(self.tokens[i] for i in ids if self.tokens[i] not in (BLANK, UNKNOWN))
        return " ".join(text.replace(SPACE, " ").split())

    def _ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def vocab_of(track: str) -> Vocab:
    """Return all symbols of the phonetic or the word track: the same for each corpus, so that models are comparable."""
    symbols = sorted(LETTERS - {" "}) if track == "word" else SYMBOLS
    return Vocab((BLANK, SPACE, *symbols, UNKNOWN))


def load_vocab(model: Path) -> Vocab:
    """Return the vocabulary of a saved model. Raises StreamtrainError if its `vocab.json` is not valid."""
    from pydantic import TypeAdapter  # a submission, which has no pydantic, reads a vocabulary that this has checked

    from sharding.files.document import Count, parse, read_document

    path = model / "vocab.json"
    try:
        ids = parse(read_document(path), TypeAdapter(dict[str, Count]))
    except (OSError, ValueError) as error:
        raise StreamtrainError(
            f"{path}: no vocabulary ({reason_of(error)})", "give the folder of a trained model, such as RUN/best"
        ) from error
    tokens = tuple(sorted(ids, key=ids.__getitem__))
    if [ids[token] for token in tokens] != list(range(len(tokens))) or not {BLANK, UNKNOWN, SPACE} <= set(tokens):
        raise StreamtrainError(f"{path}: ids must run from 0 and include {BLANK}, {UNKNOWN} and {SPACE}")
    return Vocab(tokens)


def save_vocab(vocab: Vocab, folder: Path, do_normalize: bool, attention_mask: bool) -> None:
    """Write the tokenizer and feature extractor with which Transformers' ASR pipeline runs the model."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.json"
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    path.write_text(json.dumps(ids, ensure_ascii=False, indent=1), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(
        str(path),
        bos_token=None,
        eos_token=None,
        unk_token=UNKNOWN,
        pad_token=BLANK,
        word_delimiter_token=SPACE,
        clean_up_tokenization_spaces=False,
    )
    extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=SAMPLE_RATE, do_normalize=do_normalize, return_attention_mask=attention_mask
    )
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
