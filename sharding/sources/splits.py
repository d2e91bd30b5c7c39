"""Map the names that corpora give their splits to those of a shard set."""

import re
from pathlib import Path

NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "validated", "dev", "devel", "development"),
    "test": ("test", "testing"),
    "unlabelled": ("unlabelled", "unlabeled", "unsupervised"),
}
KNOWN = ", ".join(name for names in NAMES.values() for name in names)  # for messages
SUBSET = re.compile(r"([a-z]+)(?:[-_.](?:clean|other)(?:[-_.]?\d+)?)?")  # dev-clean, train_other_500, train.clean.100


def split_of(name: str) -> str | None:
    """Return the split that a name stands for, in any case and with LibriSpeech's endings; None if it is no such name.

    Longer names are not guessed at: ESPnet's `train_dev` and Kaldi's `test_dev93` are validation.
    """
    match = SUBSET.fullmatch(name.strip().lower())
    return next((split for split, names in NAMES.items() if match and match[1] in names), None)


def named_by_split(location: Path, name: re.Pattern[str]) -> list[Path]:
    """Return the file itself if it has such a name, or the files in a folder whose first group is that of a split."""
    if location.is_file():
        return [location] if name.fullmatch(location.name) else []
    files = location.iterdir() if location.is_dir() else ()
    return sorted(path for path in files if (match := name.fullmatch(path.name)) and split_of(match[1]))
