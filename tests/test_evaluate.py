"""Every recording scored once, the long ones as a whole; the scorecard's groups add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import make_corpus
from tiny_model import make_tiny_model

from sharding.format import read_index, read_sample
from sharding.ipa import normalize_ipa
from sharding.store import open_store
from streamtrain.config import ModelConfig
from streamtrain.evaluate import evaluate_model
from streamtrain.metrics import EditCounts, count_edits
from streamtrain.model import load_model, save_model
from streamtrain.world import World

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every child is a validation child; two recordings are long."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_corpus(folder / "raw", clips=14, children=4, long_clips=2)
    command = [sys.executable, "-m", "sharding", "build", folder / "raw", "--out", folder / "shards"]
    subprocess.run([*map(str, command), "--valid-fraction", "1"], cwd=ROOT, check=True, capture_output=True)
    return folder / "shards"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder / "encoder")
    network = load_model(ModelConfig(pretrained=str(folder / "encoder")))
    save_model(network, folder / "model", dict(network.network.state_dict()))
    return folder / "model"


def score(
    model: Path, shards: Path, out: Path, batch_seconds: float = 10
) -> tuple[dict[str, object], list[dict[str, object]]]:
    card = evaluate_model(str(model), str(shards), "valid", batch_seconds, out, World())
    return card, [json.loads(line) for line in (out / "hypotheses.jsonl").read_text().splitlines()]


def test_every_recording_is_scored_once_against_its_whole_label(shards: Path, model: Path, tmp_path: Path) -> None:
    store = open_store(shards)
    index = read_index(store)
    samples = [read_sample(store, index, row) for row in index.split("valid").tolist()]
    labels = {s.recording_id: s.parent_text if s.parent_id else s.text for s in samples if s.piece == 0}
    assert sum(sample.parent_id is not None for sample in samples) >= 4  # pieces of two recordings

    card, rows = score(model, shards, tmp_path)
    assert {row["utterance_id"]: row["reference"] for row in rows} == labels
    assert len(rows) == card["clips"] == 16
    counted = sum(
        (count_edits(normalize_ipa(str(row["reference"])), normalize_ipa(str(row["hypothesis"]))) for row in rows),
        EditCounts(),
    )
    assert (card["edits"], card["reference_length"]) == (counted.edits, counted.reference_length)
    assert card["cer"] == counted.edits / counted.reference_length


def test_the_groups_of_the_scorecard_add_up_to_its_total(shards: Path, model: Path, tmp_path: Path) -> None:
    card, _ = score(model, shards, tmp_path)
    groups = card["groups"]
    assert isinstance(groups, dict)
    for name in ("corpus", "age_bucket", "duration", "label_length"):
        for field in ("edits", "reference_length", "clips"):
            assert sum(row[field] for row in groups[name]) == card[field], (name, field)
    assert sum(row["clips"] for row in card["calibration"]) == card["clips"]  # type: ignore[attr-defined]
    assert sum(int(card[kind]) for kind in ("substitutions", "deletions", "insertions")) == card["edits"]  # type: ignore[call-overload]


def test_what_is_heard_does_not_depend_on_the_size_of_batches(shards: Path, model: Path, tmp_path: Path) -> None:
    heard = []
    for batch_seconds in (1, 10, 100):
        _, rows = score(model, shards, tmp_path / str(batch_seconds), batch_seconds)
        heard.append([(row["utterance_id"], row["hypothesis"]) for row in rows])
    assert heard[0] == heard[1] == heard[2]
