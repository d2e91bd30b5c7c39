"""Cut a long recording, and tell which words belong to which piece.

Words are given to pieces by what is heard: with the sounds of the corpus's own labels (pass 1) or, where a model has
aligned the label, by that (pass 2). A piece whose label is not nearly certain is kept without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from sharding.audio.codec import SAMPLE_RATE, Waveform, frame_count
from sharding.audio.vad import MAX_STOP_SEC, SpeechActivity, Stretch, detect_speech, find_pauses, find_stretches
from sharding.labels.ipa import ctc_frames_needed
from sharding.segment.acoustic_model import PhoneGMM
from sharding.segment.cuts import MAX_DURATION_SEC, Cut, find_cuts
from sharding.segment.evidence import Evidence

MIN_BETWEEN = 0.01  # probability that a cut in a pause falls between words, below which a model is not believed
RATE_FACTOR = 2.0  # a piece says at most so many times as many symbols a second as its recording, and at least 1 / that


@dataclass(frozen=True, slots=True)
class Pass1Label:
    """What pass 1 said of a piece that pass 2 has labelled: a check on how sure it may be."""

    confidence: float
    right: bool  # it would have given the same words


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an utterance and the words said in it. Times in seconds are whole samples ÷ 16,000."""

    utterance_id: str
    start_sec: float
    end_sec: float
    text: str
    label_status: str  # labelled | unlabelled | reference
    confidence: float  # the probability that both its cuts fall between the words that they should
    forced: bool = False  # one of its ends was cut where there was no pause
    by: str = "acoustic_model"  # or "alignment": how its words were found
    reason: str | None = None  # why it has no label; what is special to this piece stands after a colon
    pass1: Pass1Label | None = None  # where a model has labelled it

    @property
    def samples(self) -> int:
        return round(self.end_sec * SAMPLE_RATE) - round(self.start_sec * SAMPLE_RATE)


@dataclass(frozen=True)
class LabelThresholds:
    """What a piece's label must pass."""

    min_confidence: float = 0.95  # probability, of each of its cuts
    max_gap: float = 0.0  # nats, how much likelier what is heard may be than the label, in half a second
    min_word_llr: float = 3.0  # nats, by which the label is likelier with a word than without it, each


@dataclass(frozen=True, slots=True)
class LabelDecision:
    """The words that one piece is given, how sure we are of them, in [0, 1], and why they are refused, if they are."""

    text: str
    confidence: float
    refused: str | None = None


def split_recording(
    utterance_id: str,
    waveform: Waveform,
    text: str,
    max_duration: float = MAX_DURATION_SEC,
    activity: SpeechActivity | None = None,
    evidence: Evidence | None = None,
    acoustic_model: PhoneGMM | None = None,
    thresholds: LabelThresholds = LabelThresholds(),
) -> list[Segment]:
    """Pieces of at most `limit_sec` that tile the recording to the sample, with their words where certain.

    With the `evidence` of a model, which must be of this label and these cuts to count, pass 2 says which words;
    otherwise pass 1 does, with the `sounds` of the corpus.
    """
    activity = activity or detect_speech(waveform)
    pauses = find_pauses(activity)
    cuts = find_cuts(activity, pauses, len(waveform), max_duration)
    ends = [0, *(cut.position for cut in cuts), len(waveform)]
    stretches = find_stretches(activity, pauses, len(waveform))

    def give(said: Evidence, max_gap: float) -> list[LabelDecision]:
        return words_by_evidence(text, said, cuts, stretches, len(waveform), replace(thresholds, max_gap=max_gap))

    useless = evidence.why_unusable(text, tuple(ends[1:-1])) if evidence else None
    pass1 = None
    if acoustic_model and text.strip():
        own = acoustic_model.align(text, waveform, stretches, ends[1:-1])
        pass1 = None if own.error else give(own, acoustic_model.max_gap)
    if evidence and not useless:
        by, given = "alignment", give(evidence, thresholds.max_gap)
    else:
        by, given = "acoustic_model", pass1 or [_no_label(text, activity, len(waveform))] * (len(ends) - 1)
    if useless:
        given = [replace(words, refused=words.refused and f"{words.refused} ({useless})") for words in given]
    forced = [False, *(cut.forced for cut in cuts), False]
    segments = [
        _segment(utterance_id, start, end, words, forced[piece] or forced[piece + 1], by)
        for piece, (start, end, words) in enumerate(zip(ends, ends[1:], given, strict=False))
    ]
    if by == "acoustic_model" or pass1 is None:
        return segments
    return [_compare_with_pass1(*pair) for pair in zip(segments, pass1, strict=True)]


def _no_label(text: str, activity: SpeechActivity, samples: int) -> LabelDecision:
    """What pass 1 says of a piece where it hears no words."""
    if not text.strip():
        return LabelDecision("", float(activity.silent), None if activity.silent else "speech without a label")
    if frame_count(samples) < ctc_frames_needed(text):
        return LabelDecision("", 0.0, "the label does not fit into the recording")
    return LabelDecision("", 0.0, "too few labels to learn the sounds of words from, or too long a recording")


def words_by_evidence(
    text: str,
    evidence: Evidence,
    cuts: Sequence[Cut],
    stretches: Sequence[Stretch],
    samples: int,
    thresholds: LabelThresholds = LabelThresholds(),
) -> list[LabelDecision]:
    """For each piece its words, as they were heard.

    Refused where a cut is not sure, where what is heard is something else than the label, where a word is not heard,
    not before the next or on both sides of a pause, where somebody speaks and the label has no word, or where words
    come much faster or slower than in the rest of the recording. A cut in a pause lies between words, whatever the
    room's noise is taken for: what is said of the cut is taken under that condition.
    """
    words = text.split()
    bounds = np.maximum.accumulate([0, *evidence.words_before, len(words)]).tolist()
    forced = [cut.forced for cut in cuts]
    between = np.where(forced, 1.0, np.maximum(1 - np.array(evidence.inside), MIN_BETWEEN))
    sure = [1.0, *np.minimum(evidence.probability / between, 1.0).tolist(), 1.0]
    voiced = [each for each in stretches if each.voiced]
    wordless = [each for each in voiced if not evidence.has_word(each.start, each.end)]
    pauses = [(one.end, other.start) for one, other in pairwise(voiced)]
    over = [evidence.word_across(*pause) for pause in pauses if pause[1] - pause[0] > MAX_STOP_SEC * SAMPLE_RATE]
    ends = [0, *(cut.position for cut in cuts), samples]
    spoken = [max(_overlap(stretches, start, end) / SAMPLE_RATE, 0.1) for start, end in pairwise(ends)]  # seconds
    rate = sum(map(len, words)) / sum(spoken)  # symbols a second
    given = []
    for piece, (start, end) in enumerate(pairwise(bounds)):
        said = words[start:end]
        confidence = min(sure[piece], sure[piece + 1])
        own = sum(map(len, said)) / spoken[piece]
        torn = [words[word] for word in over if word is not None and start <= word < end]
        unsaid = [each for each in wordless if _overlap([each], ends[piece], ends[piece + 1])]
        refused = None
        if confidence < thresholds.min_confidence:
            refused = f"a cut is not sure: {confidence:.2f}"
        elif evidence.gaps[piece] > thresholds.max_gap:
            gap, allowed = f"{evidence.gaps[piece]:.1f}", f"{thresholds.max_gap:.1f}"
            if gap == allowed:
                gap, allowed = f"{evidence.gaps[piece]:.4g}", f"{thresholds.max_gap:.4g}"
            refused = f"something else is heard than the label says: by {gap} nats where {allowed} may be"
        elif said and min(evidence.words[start:end]) < thresholds.min_word_llr:
            worst = min(range(start, end), key=evidence.words.__getitem__)
            refused = f"a word is not heard: {evidence.words[worst]:.1f} nats speak for '{words[worst]}'"
        elif said and min(evidence.order[start : end - 1], default=0.0) < 0:
            worst = min(range(start, end - 1), key=evidence.order.__getitem__)
            refused = f"two words are likelier the other way round: '{words[worst]} {words[worst + 1]}'"
        elif torn:
            refused = f"a word is heard on both sides of a pause: '{torn[0]}'"
        elif unsaid:
            first, last = unsaid[0].start / SAMPLE_RATE, unsaid[0].end / SAMPLE_RATE
            refused = f"somebody speaks where no word of the label is heard: at {first:.1f} – {last:.1f} s"
        elif said and not rate / RATE_FACTOR <= own <= rate * RATE_FACTOR:
            refused = f"too fast or too slow: {own:.1f} symbols a second of speech, where the recording has {rate:.1f}"
        given.append(LabelDecision(" ".join(said), confidence, refused))
    return given


def _segment(utterance_id: str, start: int, end: int, given: LabelDecision, forced: bool, by: str) -> Segment:
    refused = given.refused
    if refused is None and forced and by == "acoustic_model":
        refused = "cut where there is no pause"
    if refused is None and frame_count(end - start) < ctc_frames_needed(given.text):
        refused = "its words need more frames than it has"
    return Segment(
        utterance_id,
        start / SAMPLE_RATE,
        end / SAMPLE_RATE,
        "" if refused else given.text,
        "unlabelled" if refused else "labelled",
        round(given.confidence, 4),
        forced,
        by,
        refused,
    )


def _compare_with_pass1(segment: Segment, guess: LabelDecision) -> Segment:
    """With what pass 1 says, where both say something."""
    if segment.label_status != "labelled" or not guess.confidence:
        return segment
    return replace(segment, pass1=Pass1Label(round(guess.confidence, 4), guess.text == segment.text))


def _overlap(stretches: Sequence[Stretch], start: int, end: int) -> int:
    """Samples that they have in common with those from `start` to `end`."""
    return sum(max(min(stretch.end, end) - max(stretch.start, start), 0) for stretch in stretches)
