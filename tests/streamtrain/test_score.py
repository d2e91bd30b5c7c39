"""`score` compares two files as the challenge does, and starts at once."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jiwer
import pytest

from sharding.labels.pasketti import normalize_ipa
from streamtrain.eval.score import ScoreError, score_files
from tests.tools.commands import ROOT, run_module

Write = Callable[..., Path]

REFERENCES = {"a": "ðə kæt", "b": "sæt", "c": "ʧɪn", "d": ""}
HYPOTHESES = {"a": "ðə kɑt", "b": "æts", "c": "ˈt͡ʃɪn.", "d": "k"}
CER = 4 / 12  # kæt → kɑt; sæt → æts; tʃ is ʧ and stress does not count; k for nothing


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(name: str, texts: Mapping[str, str | None]) -> Path:
        rows = [json.dumps({"utterance_id": key, "phonetic_text": text}) + "\n" for key, text in texts.items()]
        (tmp_path / name).write_text("".join(rows), "utf-8")
        return tmp_path / name

    return run


def test_the_command_prints_the_rate_as_json_or_in_a_line(write: Write) -> None:
    predicted, actual = write("predicted.jsonl", HYPOTHESES), write("actual.jsonl", REFERENCES)
    done = run_module("streamtrain", "score", predicted, actual, "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["cer"] == pytest.approx(CER, abs=1e-12)
    assert (result["substitutions"], result["deletions"], result["insertions"]) == (1, 1, 2)
    assert (result["reference_length"], result["edits"], result["clips"]) == (12, 4, 4)
    assert run_module("streamtrain", "score", predicted, actual).stdout.startswith("CER 0.333333: 4 edits")


def test_rows_may_come_in_any_order_with_blank_lines_and_null_for_nothing(write: Write) -> None:
    actual = write("actual.jsonl", REFERENCES | {"d": None})
    predicted = write("predicted.jsonl", dict(reversed(HYPOTHESES.items())))
    predicted.write_text("\n" + predicted.read_text("utf-8").replace("\n", "\r\n\n"), "utf-8")
    assert score_files(predicted, actual)["cer"] == pytest.approx(CER, abs=1e-12)


def test_the_rate_is_jiwers_over_the_whole_corpus(write: Write) -> None:
    references = {str(n): "ðə kæt sæt"[: 3 + n % 7] for n in range(40)}
    hypotheses = {str(n): "kæt sæt ðə"[n % 4 :] for n in range(40)}
    result = score_files(write("predicted.jsonl", hypotheses), write("actual.jsonl", references))
    wanted = jiwer.cer([normalize_ipa(t) for t in references.values()], [normalize_ipa(t) for t in hypotheses.values()])
    assert result["cer"] == pytest.approx(wanted, abs=1e-12)


def test_ids_that_differ_by_their_unicode_form_or_outer_blanks_are_the_same(write: Write) -> None:
    actual = write("actual.jsonl", {"an\u00e3o": "kæt"})
    assert score_files(write("predicted.jsonl", {"ana\u0303o ": "kæt"}), actual)["edits"] == 0
    with pytest.raises(ScoreError, match="occurs twice"):
        score_files(write("predicted.jsonl", {"ana\u0303o": "kæt", "an\u00e3o": "kæt"}), actual)


def test_files_of_the_word_track_get_a_word_error_rate(tmp_path: Path) -> None:
    said = {"a": "The colour is grey.", "b": "twenty-one apples", "c": ""}
    heard = {"a": "the color is green", "b": "21 apples", "c": "oh"}
    for name, texts in (("actual", said), ("predicted", heard)):
        rows = [json.dumps({"utterance_id": key, "orthographic_text": text}) + "\n" for key, text in texts.items()]
        (tmp_path / name).write_text("".join(rows), "utf-8")
    result = score_files(tmp_path / "predicted", tmp_path / "actual")
    assert next(iter(result)) == "wer"  # the official one is the first
    assert (result["wer"], result["edits"], result["reference_length"]) == (2 / 6, 2, 6)
    done = run_module("streamtrain", "score", tmp_path / "predicted", tmp_path / "actual")
    assert done.stdout.startswith("WER 0.333333: 2 edits")
    assert "6 words" in done.stdout


def test_files_of_two_tracks_are_not_compared(write: Write, tmp_path: Path) -> None:
    (tmp_path / "words").write_text('{"utterance_id": "a", "orthographic_text": "hi"}\n')
    with pytest.raises(ScoreError, match=r"actual\.jsonl:1: not a row with utterance_id and orthographic_text"):
        score_files(tmp_path / "words", write("actual.jsonl", REFERENCES))


def test_of_the_hypotheses_of_a_run_it_is_told_where_their_score_is(tmp_path: Path, write: Write) -> None:
    (tmp_path / "hypotheses.jsonl").write_text('{"utterance_id": "a", "reference": "k", "hypothesis": "k"}\n')
    with pytest.raises(ScoreError, match=r"hint: these hypotheses are already scored: see scorecard\.json"):
        score_files(tmp_path / "hypotheses.jsonl", write("actual.jsonl", REFERENCES))


def test_missing_and_surplus_ids_are_named(write: Write) -> None:
    fewer = {"a": "k"}
    with pytest.raises(ScoreError, match=r"(?m)few\.jsonl: has no row for 3 ids: b, c, d$"):
        score_files(write("few.jsonl", fewer), write("actual.jsonl", REFERENCES))
    with pytest.raises(ScoreError, match=r"(?m)more\.jsonl: has extra rows for 1 id: e$"):
        score_files(write("more.jsonl", HYPOTHESES | {"e": "k"}), write("actual.jsonl", REFERENCES))
    many = {f"clip-{n:03d}": "" for n in range(25)}
    with pytest.raises(ScoreError, match=r"(?m)has no row for 25 ids: clip-000, .*clip-009, …$"):
        score_files(write("none.jsonl", {}), write("actual.jsonl", many))
    done = run_module("streamtrain", "score", write("few.jsonl", fewer), write("actual.jsonl", REFERENCES))
    assert done.returncode == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"3",
        b'{"utterance_id": "x"}',
        b'{"phonetic_text": "x"}',
        b'{"utterance_id": 3, "phonetic_text": "x"}',
        b'{"utterance_id": "x", "phonetic_text": ["x"]}',
        b"\xff\xfe\x00 not text",
        b"[" * 100_000,
    ],
    ids=lambda line: line[:40].decode("latin-1"),
)
def test_a_malformed_row_is_named_by_file_and_number(line: bytes, write: Write, tmp_path: Path) -> None:
    actual = write("actual.jsonl", REFERENCES)
    for position in (0, 2):
        lines = actual.read_bytes().splitlines()
        lines.insert(position, line)
        (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
        with pytest.raises(ScoreError, match=rf"bad\.jsonl:{position + 1}: not a row with utterance_id"):
            score_files(tmp_path / "bad.jsonl", actual)


def test_an_id_that_comes_twice_is_named(write: Write) -> None:
    actual = write("actual.jsonl", REFERENCES)
    actual.write_text(actual.read_text("utf-8") * 2, "utf-8")
    with pytest.raises(ScoreError, match=r"actual\.jsonl:5: utterance_id 'a' occurs twice"):
        score_files(write("predicted.jsonl", HYPOTHESES), actual)


def test_a_missing_file_is_named(write: Write, tmp_path: Path) -> None:
    done = run_module("streamtrain", "score", tmp_path / "none.jsonl", write("actual.jsonl", REFERENCES))
    assert done.returncode == 1
    assert "none.jsonl: No such file" in done.stderr


def test_it_starts_without_torch_or_transformers(write: Write) -> None:
    predicted, actual = write("predicted.jsonl", HYPOTHESES), write("actual.jsonl", REFERENCES)
    program = (
        "import sys\nfrom streamtrain.cli import main\n"
        f"code = main(['score', {str(predicted)!r}, {str(actual)!r}])\n"
        "print(code, sorted({'torch', 'transformers', 'deepspeed', 'pandas', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_units_without_a_profile_are_refused(write: Write) -> None:
    rows = write("rows.jsonl", REFERENCES)
    done = run_module("streamtrain", "score", rows, rows, "--units", "tokens")
    assert done.returncode == 1
    assert "--units has no effect without --profile" in done.stderr
