"""Where long recordings are cut, and whether each piece gets the words said in it, beside simpler ways.

`python -m tests.benchmarks.splitting MODEL`; `make bench` does it with the demo's, trained on in noise such as theirs.

Two benchmarks. Synthetic: espeak-ng recites phrases and word lists with pauses of two kinds in rooms of 5 to 20 dB, so
that all joints are known. Real: a folder of recordings with a `truth.jsonl` beside its transcripts, where one is given.
Thresholds are the build's defaults; they were tuned on other children's recordings (`--seed 7`).
"""

import argparse
import io
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import zstandard

from sharding.audio.codec import SAMPLE_RATE, decode
from sharding.audio.vad import detect_speech
from sharding.segment.split import MIN_BETWEEN
from sharding.sources.synthetic import SAMPLE_RATE as ESPEAK_RATE
from sharding.sources.synthetic import (
    DemoRow,
    Espeak,
    Samples,
    Speaker,
    derive_id,
    open_espeak,
    plan_children,
    say_phrase,
    store_audio,
    write_manifest,
)
from streamtrain.eval.metrics import EditCounts, count_edits
from streamtrain.model.decode import greedy, join_texts
from streamtrain.model.inference import compute_log_probs
from streamtrain.model.pretrained import load_trained
from tests.benchmarks.report import machine
from tests.benchmarks.timing import ROOT, WORK

RESULT = WORK / "splitting.json"
PAUSES_SEC = {"A": (0.6, 2.5), "B": (0.25, 0.5)}
SNR_DB = (5.0, 20.0)
RECORDING_SEC = (30.0, 120.0)
NEAR_SEC = 0.05  # a cut so far from a joint is still in it
LOUD_DB = 10.0  # above the recording's noise floor somebody may be speaking
LIMIT_SEC = 25.0
PROBABILITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.01)
CORRUPTIONS = ("dropped", "doubled", "swapped", "another's")


@dataclass(frozen=True)
class Joint:
    """A pause between two things said, seconds, and the words of the label before it."""

    start_sec: float
    end_sec: float
    words_before: int


@dataclass(frozen=True)
class Truth:
    utterance_id: str
    tier: str  # A: long pauses, B: short ones
    joints: tuple[Joint, ...]

    def words_before(self, second: float) -> int | None:
        """Of the label, at a cut; None where that lies in no joint."""
        for joint in self.joints:
            if joint.start_sec - NEAR_SEC <= second <= joint.end_sec + NEAR_SEC:
                return joint.words_before
        return None

    def said(self, piece: "Piece", words: Sequence[str]) -> list[str] | None:
        """The words of the label that a piece says; None where one of its cuts lies in no joint."""
        first = 0 if piece.first else self.words_before(piece.start_sec)
        last = len(words) if piece.last else self.words_before(piece.end_sec)
        return None if first is None or last is None else list(words[first:last])


class Piece(NamedTuple):
    """What a way of splitting says of a stretch of a recording."""

    start_sec: float
    end_sec: float
    text: str
    accepted: bool
    forced: bool
    first: bool  # of its recording
    last: bool


@dataclass
class Count:
    """Errors ÷ judged, with a Wilson interval of 95 % (Wilson 1927)."""

    errors: float = 0
    judged: float = 0

    def add(self, errors: float, judged: float = 1) -> None:
        self.errors += errors
        self.judged += judged

    @property
    def interval(self) -> tuple[float, float]:
        if not self.judged:
            return 0.0, 1.0
        z, n, p = 1.96, self.judged, self.errors / self.judged
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max((middle - half) / (1 + z * z / n), 0.0), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        if not self.judged:
            return "none judged"
        low, high = self.interval
        return f"{self.errors:,.0f} ÷ {self.judged:,.0f} = {self.errors / self.judged:.2%} ({low:.2%} – {high:.2%})"


# --- synthetic recordings ---------------------------------------------------------------------------------------


def make_recordings(folder: Path, hours: float, seed: int) -> None:
    """Recordings by children whom no model of the demo has heard, half of them lists of single words."""
    if (folder / "truth.jsonl").exists():
        return
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    children = plan_children(24, seed)
    rows, truths, spoken = [], [], 0.0
    with open_espeak() as espeak:
        while spoken < hours * 3600:
            number = len(rows)
            child = replace(children[number % len(children)], snr_db=float(rng.uniform(*SNR_DB)))
            tier, drill = "AB"[number // 2 % 2], number % 2 == 0
            row, truth = _record(espeak, child, tier, drill, rng, folder, number)
            rows.append(row)
            truths.append(truth)
            spoken += row.audio_duration_sec
    write_manifest(folder, rows)
    (folder / "truth.jsonl").write_text("".join(json.dumps(asdict(truth)) + "\n" for truth in truths))


def _record(
    espeak: Espeak, child: Speaker, tier: str, drill: bool, rng: np.random.Generator, folder: Path, number: int
) -> tuple[DemoRow, Truth]:
    espeak.become(child)
    target = rng.uniform(*RECORDING_SEC)
    parts: list[Samples] = [np.zeros(round(rng.uniform(0.1, 0.3) * ESPEAK_RATE), np.int16)]
    joints: list[Joint] = []
    words: list[str] = []
    while True:
        speech, text = _say_word(espeak, rng) if drill else say_phrase(espeak, rng)
        parts.append(speech)
        words += text.split()
        here = sum(map(len, parts)) / ESPEAK_RATE
        if here >= target:
            break
        pause = rng.uniform(*PAUSES_SEC[tier])
        parts.append(np.zeros(round(pause * ESPEAK_RATE), np.int16))
        joints.append(Joint(here, here + pause, len(words)))
    parts.append(np.zeros(round(rng.uniform(0.1, 0.3) * ESPEAK_RATE), np.int16))
    sound = _in_a_room(np.concatenate(parts), child.snr_db, rng)
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, ESPEAK_RATE, format="FLAC", subtype="PCM_16")
    name = derive_id("U", "splitting", number)
    row = DemoRow(name, child.child_id, derive_id("S", "splitting", number), "", round(len(sound) / ESPEAK_RATE, 3),
              child.age_bucket, "", 0, " ".join(words))  # fmt: skip
    return store_audio(row, buffer.getvalue(), folder), Truth(name, tier, tuple(joints))


def _say_word(espeak: Espeak, rng: np.random.Generator) -> tuple[Samples, str]:
    while True:
        speech, text = say_phrase(espeak, rng)
        if " " not in text:
            return speech, text


def _in_a_room(speech: Samples, snr_db: float, rng: np.random.Generator) -> Samples:
    """With the room's own noise everywhere, never digital silence."""
    signal = speech.astype(np.float32)
    signal *= rng.uniform(0.2, 0.4) * 32767 / np.abs(signal).max()
    loudness = np.sqrt(np.mean(np.square(signal[speech != 0])))
    noise = rng.standard_normal(len(signal), np.float32)
    noise = np.convolve(noise, np.array([0.5, 0.3, 0.2], np.float32), "same")  # duller than white
    noise *= loudness * 10 ** (-snr_db / 20) / noise.std()
    return np.clip(np.rint(signal + noise), -32768, 32767).astype(np.int16)


# --- ways of splitting ------------------------------------------------------------------------------------------


def pieces_of_build(shards: Path) -> dict[str, list[Piece]]:
    """By utterance id, as the ledger of a build tells."""
    found = {}
    with open(shards / "report/ledger.jsonl.zst", "rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8"):
            row = json.loads(line)
            found[row["utterance_id"]] = [
                Piece(piece["start_sec"], piece["end_sec"], piece["text"], piece["label_status"] == "labelled",
                      piece["forced"], piece is row["pieces"][0], piece is row["pieces"][-1])
                for piece in row["pieces"]
            ]  # fmt: skip
    return found


def simpler_ways(waveform: np.ndarray, text: str) -> dict[str, list[Piece]]:
    """Words by their share of the time, whatever is said; all accepted."""
    seconds = len(waveform) / SAMPLE_RATE
    count = math.ceil(seconds / LIMIT_SEC)
    ways = {
        "proportional": [seconds * number / count for number in range(1, count)],
        "greedy Silero": list(_greedy(waveform)),
        "25 s grid": [LIMIT_SEC * number for number in range(1, count)],
    }
    return {name: list(_by_share(cuts, seconds, text.split())) for name, cuts in ways.items()}


def _greedy(waveform: np.ndarray) -> Iterator[float]:
    """The middle of the longest gap in each window of 25 s, from the last cut on."""
    heard = detect_speech(waveform)
    quiet, start = heard.speech < 0.3, 0
    while len(quiet) - start > LIMIT_SEC * 100:
        window = quiet[start + 150 : start + int(LIMIT_SEC * 100)]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], window, [False]]).astype(np.int8))).reshape(-1, 2)
        if len(edges):
            first, last = edges[np.diff(edges, axis=1).argmax()]
            start += 150 + int(first + last) // 2
        else:
            start += int(LIMIT_SEC * 100)
        yield start / 100


def _by_share(cuts: Sequence[float], seconds: float, words: Sequence[str]) -> Iterator[Piece]:
    middles = (np.cumsum([len(word) + 1 for word in words]) - [len(word) / 2 for word in words]) * seconds
    middles = middles / max(sum(len(word) + 1 for word in words), 1)
    for start, end in pairwise([0.0, *cuts, seconds]):
        said = [word for word, middle in zip(words, middles, strict=True) if start <= middle < end]
        yield Piece(start, end, " ".join(said), True, False, start == 0, end == seconds)


# --- judging ----------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What is counted of one way, over recordings of a tier."""

    tiled: Count
    over_limit: Count
    outside_joints: Count  # cuts that are in no joint
    loud: Count  # cuts where somebody may be speaking, forced ones aside
    inexact: Count  # accepted pieces whose label is not the words said in them
    misplaced: Count  # words on the wrong side, among accepted pieces
    refused: Count  # seconds

    @classmethod
    def empty(cls) -> "Verdict":
        return cls(*(Count() for _ in range(7)))


def judge(verdict: Verdict, pieces: Sequence[Piece], truth: Truth, text: str, waveform: np.ndarray) -> None:
    words = text.split()
    level = _level_db(waveform)
    floor = float(np.percentile(level, 10))
    ends = [round(piece.end_sec * SAMPLE_RATE) for piece in pieces]
    starts = [round(piece.start_sec * SAMPLE_RATE) for piece in pieces]
    verdict.tiled.add(starts != [0, *ends[:-1]] or ends[-1] != len(waveform))
    for piece, following in pairwise(pieces):
        if not (piece.forced and following.forced):
            verdict.outside_joints.add(truth.words_before(piece.end_sec) is None)
            frame = min(int(piece.end_sec * 100), len(level) - 1)
            verdict.loud.add(float(level[frame]) > floor + LOUD_DB)
    for piece in pieces:
        lasting = piece.end_sec - piece.start_sec
        verdict.over_limit.add(lasting > LIMIT_SEC)
        verdict.refused.add(0 if piece.accepted else lasting, lasting)
        if piece.accepted:
            given, said = piece.text.split(), truth.said(piece, words)
            verdict.inexact.add(given != said)
            if said is not None:
                verdict.misplaced.add(_misplaced(given, said), max(len(said), 1))


def _misplaced(given: Sequence[str], said: Sequence[str]) -> int:
    """Words that stand in a label and were said elsewhere, or the reverse."""
    counts = count_edits(given, said)
    return counts.substitutions + counts.deletions + counts.insertions


def _level_db(waveform: np.ndarray) -> np.ndarray:
    """Mean level of the 100 ms around each hundredth of a second."""
    power = np.convolve(np.square(waveform, dtype=np.float64), np.full(SAMPLE_RATE // 10, 10 / SAMPLE_RATE), "same")
    decibels: np.ndarray = 10 * np.log10(power[:: SAMPLE_RATE // 100] + 1e-10)
    return decibels


def corrupted(text: str, kind: str, other: str, rng: np.random.Generator) -> str:
    """A label that is wrong in one place, or all of it."""
    words = text.split()
    at = int(rng.integers(1, len(words) - 2))
    while kind == "swapped" and words[at] == words[at + 1]:
        at = int(rng.integers(1, len(words) - 2))
    changed = {
        "dropped": words[:at] + words[at + 1 :],
        "doubled": words[: at + 1] + words[at:],
        "swapped": [*words[:at], words[at + 1], words[at], *words[at + 2 :]],
        "another's": other.split(),
    }
    return " ".join(changed[kind])


# --- the benchmark ----------------------------------------------------------------------------------------------


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_phon_transcripts.jsonl").read_text("utf-8").splitlines()]


def read_truth(folder: Path) -> dict[str, Truth]:
    truths = [json.loads(line) for line in (folder / "truth.jsonl").read_text("utf-8").splitlines()]
    return {
        row["utterance_id"]: Truth(row["utterance_id"], row["tier"], tuple(Joint(**joint) for joint in row["joints"]))
        for row in truths
    }


def run(*command: object) -> float:
    """Seconds that it took."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - started


def two_passes(corpus: Path, model: Path, out: Path) -> tuple[dict[str, dict[str, list[Piece]]], dict[str, float]]:
    """Both builds of a corpus: pieces by pass, and the seconds that each step took."""
    for earlier in ("pass1", "pass2"):  # of another model, maybe
        shutil.rmtree(out / earlier, ignore_errors=True)
    build = ("sharding", "build", corpus, "--valid-fraction", 0, "--workers", 1, "--out")
    took = {"pass 1": run(*build, out / "pass1")}
    took["align"] = run("streamtrain", "align", model, out / "pass1", "--out", out / "alignments.jsonl.zst")
    took["pass 2"] = run(*build, out / "pass2", "--alignments", out / "alignments.jsonl.zst")
    return {name: pieces_of_build(out / name.replace(" ", "")) for name in ("pass 1", "pass 2")}, took


def compare(corpus: Path, passes: dict[str, dict[str, list[Piece]]]) -> dict[str, Verdict]:
    """The verdict on each way and tier, as "way, tier"."""
    truths, verdicts = read_truth(corpus), dict[str, Verdict]()
    for row in read_rows(corpus):
        truth = truths[row["utterance_id"]]
        waveform, _ = decode((corpus / row["audio_path"]).read_bytes())
        ways = {name: found[row["utterance_id"]] for name, found in passes.items()}
        for name, pieces in (ways | simpler_ways(waveform, row["phonetic_text"])).items():
            verdict = verdicts.setdefault(f"{name}, {truth.tier}", Verdict.empty())
            judge(verdict, pieces, truth, row["phonetic_text"], waveform)
    return verdicts


def corrupt(corpus: Path, model: Path, out: Path) -> dict[str, Count]:
    """Of each pass and kind of corruption, recordings of which a piece with a wrong label was accepted."""
    rng = np.random.default_rng(0)
    rows, truths = read_rows(corpus), read_truth(corpus)
    kinds = {row["utterance_id"]: CORRUPTIONS[number % len(CORRUPTIONS)] for number, row in enumerate(rows)}
    changed = [
        row
        | {"phonetic_text": corrupted(row["phonetic_text"], kinds[row["utterance_id"]], other["phonetic_text"], rng)}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    passes, _ = two_passes(_beside(corpus, out / "corrupted", changed), model, out / "of-corrupted")
    counts = dict[str, Count]()
    for name, found in passes.items():
        for row in rows:
            key, words = row["utterance_id"], row["phonetic_text"].split()
            wrong = any(_is_wrong(piece, truths[key], words) for piece in found[key] if piece.accepted)
            for kind in (kinds[key], "all"):
                counts.setdefault(f"{name}, {kind}", Count()).add(wrong)
    return counts


def _beside(corpus: Path, folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A corpus of other rows over the same audio."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "audio").exists():
        (folder / "audio").symlink_to((corpus / "audio").resolve())
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train_phon_transcripts.jsonl").write_text(lines, "utf-8")
    return folder


def _is_wrong(piece: Piece, truth: Truth, words: Sequence[str]) -> bool:
    said = truth.said(piece, words)
    return said is None or piece.text.split() != said


def reliability(corpus: Path, alignments: Path) -> list[str]:
    """Of cuts in a joint, by how sure pass 2 is of them: those with other words before them than are."""
    truths = read_truth(corpus)
    bins: dict[tuple[float, float], Count] = {edges: Count() for edges in pairwise(PROBABILITIES)}
    with open(alignments, "rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8"):
            row = json.loads(line)
            for cut in row["cuts"]:
                true = truths[row["utterance_id"]].words_before(cut["at"])
                if true is not None:
                    sure = min(cut["probability"] / max(1 - cut["inside"], MIN_BETWEEN), 1.0)
                    edges = next(edges for edges in bins if edges[0] <= sure < edges[1])
                    bins[edges].add(cut["words_before"] != true)
    return [f"  {low:.2f} ≤ P < {high:.2f}  {count} wrong" for (low, high), count in bins.items() if count.judged]


def joined_cer(corpus: Path, folder: Path, pieces: dict[str, list[Piece]]) -> dict[str, float]:
    """CER of the joined decodes of pieces, beside those of recordings cut at true joints alone."""
    model = load_trained(folder)
    truths, counts = read_truth(corpus), dict[str, EditCounts]()
    for row in read_rows(corpus):
        waveform, _ = decode((corpus / row["audio_path"]).read_bytes())
        seconds = len(waveform) / SAMPLE_RATE
        ways = {
            "our cuts": [piece.end_sec for piece in pieces[row["utterance_id"]]],
            "true joints": [*_cuts_at_joints(truths[row["utterance_id"]], seconds), seconds],
        }
        for name, ends in ways.items():
            bounds = [round(second * SAMPLE_RATE) for second in (0.0, *ends)]
            texts = []
            for start, end in pairwise(bounds):
                log_probs, frames = compute_log_probs(model, [waveform[start:end]])
                texts.append(greedy(log_probs, frames, model.vocab)[0].text)
            edits = count_edits(row["phonetic_text"], join_texts(texts))
            counts[name] = counts.get(name, EditCounts()) + edits
    return {name: count.rate for name, count in counts.items()}


def _cuts_at_joints(truth: Truth, seconds: float) -> Iterator[float]:
    """As few as the limit allows, in the middles of joints."""
    middles, start = [(joint.start_sec + joint.end_sec) / 2 for joint in truth.joints], 0.0
    while seconds - start > LIMIT_SEC:
        within = [middle for middle in middles if start < middle <= start + LIMIT_SEC]
        start = within[-1] if within else start + LIMIT_SEC
        yield start


def render(name: str, verdicts: dict[str, Verdict], corruptions: dict[str, Count]) -> str:
    what = {
        "not tiled to the sample": "tiled",
        "pieces over 25 s": "over_limit",
        "cuts in no joint": "outside_joints",
        "cuts in sound, forced aside": "loud",
        "accepted pieces with another label than is said": "inexact",
        "words on the wrong side among them": "misplaced",
        "seconds not accepted": "refused",
    }
    lines = [f"== {name}"]
    for title, attribute in what.items():
        lines.append(title)
        lines += [f"  {way:>18}  {getattr(verdict, attribute)}" for way, verdict in sorted(verdicts.items())]
    if corruptions:
        lines.append("recordings with a corrupted label of which a wrong piece was accepted")
        lines += [f"  {way:>18}  {count}" for way, count in sorted(corruptions.items())]
    return "\n".join(lines)


def of_children(corpora: Path, heard: str, folder: Path) -> Path:
    """The recordings of `corpora`/long by children of whom the model of `heard` has heard none."""
    known = {row["child_id"] for row in read_rows(corpora / heard)}
    rows = [row for row in read_rows(corpora / "long") if row["child_id"] not in known]
    (folder / "truth.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (folder / "truth.jsonl").write_text((corpora / "long/truth.jsonl").read_text("utf-8"), "utf-8")
    return _beside(corpora / "long", folder, rows)


def measure(name: str, corpus: Path, model: Path, out: Path, with_corruption: bool) -> dict[str, Any]:
    hours = sum(row["audio_duration_sec"] for row in read_rows(corpus)) / 3600
    passes, took = two_passes(corpus, model, out)
    verdicts = compare(corpus, passes)
    corruptions = corrupt(corpus, model, out) if with_corruption else {}
    cers = joined_cer(corpus, model, passes["pass 2"])
    print(render(f"{name}, {hours:.2f} h", verdicts, corruptions))
    print("cuts in a joint, by how sure pass 2 is", *reliability(corpus, out / "alignments.jsonl.zst"), sep="\n")
    print("pieces that pass 2 has labelled, by how sure pass 1 is: those to which it would have given other words")
    for row in json.loads((out / "pass2/report/summary.json").read_text("utf-8"))["reliability"]:
        print("  {:.2f} ≤ P < {:.2f}  {} wrong".format(*row["confidence"], Count(row["wrong"], row["pieces"])))
    print("CER of the joined decodes: " + ", ".join(f"{way} {cer:.4f}" for way, cer in cers.items()))
    print(
        "; ".join(f"{step} {seconds:.0f} s, {hours * 3600 / seconds:.0f} × real time" for step, seconds in took.items())
    )
    return {
        "hours": hours,
        "verdicts": {way: asdict(verdict) for way, verdict in verdicts.items()},
        "corruptions": {kind: asdict(count) for kind, count in corruptions.items()},
        "cer": cers,
        "seconds": took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="such as data/demo/noisy/best, which `make bench` trains")
    parser.add_argument(
        "--hours",
        type=float,
        default=6.2,
        help="of synthetic recordings; they make 1,000 pieces (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=8, help="of the children and what they say (default: %(default)s)")
    parser.add_argument("--real", type=Path, help="a folder with long/, which has a truth.jsonl, kids_a/ and kids_b/")
    parser.add_argument("--models", type=Path, nargs=2, help="trained on kids_a alone, and on kids_b alone")
    options = parser.parse_args()
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    out = WORK / f"splitting-{options.hours:g}-{options.seed}"
    make_recordings(out / "corpus", options.hours, options.seed)
    results = {"synthetic": measure("synthetic", out / "corpus", options.model, out, with_corruption=True)}
    for heard, model in zip(("kids_a", "kids_b"), options.models or (), strict=False):
        there = WORK / f"splitting-without-{heard}"
        corpus = of_children(options.real, heard, there / "corpus")
        results[heard] = measure(f"real, model of {heard}", corpus, model, there, with_corruption=False)
    RESULT.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
