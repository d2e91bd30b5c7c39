"""Cut a long recording into segments, and assign the words of its label to them.

Words are assigned by aligning the label with the audio: by an acoustic model of the corpus's own labels (pass 1) or, if
a trained model has aligned it, by that (pass 2). A segment whose label is not nearly certain is kept without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from sharding.audio.codec import SAMPLE_RATE, Waveform, frame_count
from sharding.audio.vad import MAX_STOP_SEC, SpeechActivity, Stretch, detect_speech, find_pauses, find_stretches
from sharding.labels.policy import LabelPolicy
from sharding.segment.acoustic_model import PhoneGMM
from sharding.segment.cuts import MAX_DURATION_SEC, Cut, find_cuts
from sharding.segment.evidence import Evidence

PHONES = LabelPolicy()
MIN_BETWEEN = 0.01  # floor of the probability that a cut in a pause falls between words; lower ones are not trusted
RATE_FACTOR = 2.0  # largest ratio of the symbols per second of a segment to those of its recording, or the reverse


@dataclass(frozen=True, slots=True)
class Pass1Label:
    """Hold the result of pass 1 for a segment that pass 2 labelled, to check the confidence of pass 1."""

    confidence: float
    right: bool  # it assigned the same words


@dataclass(frozen=True, slots=True)
class Segment:
    """Hold a part of an utterance and its words. Times in seconds are whole samples ÷ 16,000."""

    utterance_id: str
    start_sec: float
    end_sec: float
    text: str
    label_status: str  # labelled | unlabelled | reference
    confidence: float  # lower probability of its two cuts to fall between the right words
    forced: bool = False  # one of its ends is a cut outside any pause
    by: str = "acoustic_model"  # or "alignment": how its words were assigned
    reason: str | None = None  # why it has no label; details of this segment follow a colon
    pass1: Pass1Label | None = None  # if pass 2 labelled it

    @property
    def samples(self) -> int:
        return round(self.end_sec * SAMPLE_RATE) - round(self.start_sec * SAMPLE_RATE)


@dataclass(frozen=True)
class LabelThresholds:
    """Hold the thresholds that a segment's label must pass."""

    min_confidence: float = 0.95  # probability, of each of its cuts
    max_gap: float = 0.0  # nats, largest lead of the best path over the label in half a second
    min_word_llr: float = 3.0  # nats, smallest log-likelihood ratio of the label with to without a word


@dataclass(frozen=True, slots=True)
class LabelDecision:
    """Hold the words assigned to one segment, their confidence in [0, 1], and why they are refused, if they are."""

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
    labels: LabelPolicy = PHONES,
) -> list[Segment]:
    """Return segments of at most `max_duration` seconds that tile the recording to the sample, with words if certain.

    The `evidence` of a model (pass 2) assigns the words if it is of this label and these cuts; otherwise the corpus's
    `acoustic_model` does (pass 1).
    """
    activity = activity or detect_speech(waveform)
    pauses = find_pauses(activity)
    cuts = find_cuts(activity, pauses, len(waveform), max_duration)
    ends = [0, *(cut.position for cut in cuts), len(waveform)]
    stretches = find_stretches(activity, pauses, len(waveform))

    def assign(source: Evidence, max_gap: float) -> list[LabelDecision]:
        return words_by_evidence(text, source, cuts, stretches, len(waveform), replace(thresholds, max_gap=max_gap))

    mismatch = evidence.why_unusable(text, tuple(ends[1:-1])) if evidence else None
    pass1 = None
    if acoustic_model and text.strip():
        alignment = acoustic_model.align(text, waveform, stretches, ends[1:-1])
        pass1 = None if alignment.error else assign(alignment, acoustic_model.max_gap)
    if evidence and not mismatch:
        by, decisions = "alignment", assign(evidence, thresholds.max_gap)
    else:
        by, decisions = "acoustic_model", pass1 or [_no_label(text, activity, len(waveform), labels)] * (len(ends) - 1)
    if mismatch:
        decisions = [replace(label, refused=label.refused and f"{label.refused} ({mismatch})") for label in decisions]
    forced = [False, *(cut.forced for cut in cuts), False]
    segments = [
        _segment(utterance_id, start, end, label, forced[place] or forced[place + 1], by, labels)
        for place, (start, end, label) in enumerate(zip(ends, ends[1:], decisions, strict=False))
    ]
    if by == "acoustic_model" or pass1 is None:
        return segments
    return [_compare_with_pass1(*pair) for pair in zip(segments, pass1, strict=True)]


def _no_label(text: str, activity: SpeechActivity, samples: int, labels: LabelPolicy) -> LabelDecision:
    """Return the decision for each segment of a recording that pass 1 could not align."""
    if not text.strip():
        return LabelDecision("", float(activity.silent), None if activity.silent else "speech without a label")
    if frame_count(samples) < labels.frames_needed(text):
        return LabelDecision("", 0.0, "the label needs more frames than the recording has")
    return LabelDecision("", 0.0, "too few labels to train the acoustic model, or the recording is too long")


def words_by_evidence(
    text: str,
    evidence: Evidence,
    cuts: Sequence[Cut],
    stretches: Sequence[Stretch],
    samples: int,
    thresholds: LabelThresholds = LabelThresholds(),
) -> list[LabelDecision]:
    """Return the words of each segment, refused if a threshold fails.

    They are refused if a cut is uncertain, the best path beats the label by too much, a word lacks evidence, is in the
    wrong order or spans a pause, speech has no word of the label, or the speaking rate differs much from that of the
    recording. A cut in a pause lies between words, whatever the model takes the room's noise for: its probability is
    conditioned on that.
    """
    words = text.split()
    bounds = np.maximum.accumulate([0, *evidence.words_before, len(words)]).tolist()
    forced = [cut.forced for cut in cuts]
    between = np.where(forced, 1.0, np.maximum(1 - np.array(evidence.inside), MIN_BETWEEN))
    cut_confidence = [1.0, *np.minimum(evidence.probability / between, 1.0).tolist(), 1.0]
    voiced = [stretch for stretch in stretches if stretch.voiced]
    wordless = [stretch for stretch in voiced if not evidence.has_word(stretch.start, stretch.end)]
    pauses = [(before.end, after.start) for before, after in pairwise(voiced)]
    across = [evidence.word_across(*pause) for pause in pauses if pause[1] - pause[0] > MAX_STOP_SEC * SAMPLE_RATE]
    ends = [0, *(cut.position for cut in cuts), samples]
    spoken = [max(_overlap(stretches, start, end) / SAMPLE_RATE, 0.1) for start, end in pairwise(ends)]  # seconds
    rate = sum(map(len, words)) / sum(spoken)  # symbols per second
    decisions = []
    for place, (start, end) in enumerate(pairwise(bounds)):
        assigned = words[start:end]
        confidence = min(cut_confidence[place], cut_confidence[place + 1])
        segment_rate = sum(map(len, assigned)) / spoken[place]
        torn = [words[word] for word in across if word is not None and start <= word < end]
        unlabelled = [stretch for stretch in wordless if _overlap([stretch], ends[place], ends[place + 1])]
        refused = None
        if confidence < thresholds.min_confidence:
            refused = f"a cut is uncertain: {confidence:.2f}"
        elif weakness := _weakness(evidence, words, place, range(start, end), thresholds):
            refused = weakness
        elif torn:
            refused = f"a word spans a pause: '{torn[0]}'"
        elif unlabelled:
            first, last = unlabelled[0].start / SAMPLE_RATE, unlabelled[0].end / SAMPLE_RATE
            refused = f"speech without a word of the label: at {first:.1f} – {last:.1f} s"
        elif assigned and not rate / RATE_FACTOR <= segment_rate <= rate * RATE_FACTOR:
            refused = f"too fast or slow: {segment_rate:.1f} symbols per second of speech, {rate:.1f} in the recording"
        decisions.append(LabelDecision(" ".join(assigned), confidence, refused))
    return decisions


def _weakness(
    evidence: Evidence, words: Sequence[str], place: int, assigned: Sequence[int], thresholds: LabelThresholds
) -> str | None:
    """Return why the evidence refuses the words assigned to a segment, or None if it does not."""
    gap, allowed = evidence.gaps[place], thresholds.max_gap
    if gap > allowed:
        form = ".4g" if f"{gap:.1f}" == f"{allowed:.1f}" else ".1f"
        return f"the audio does not match the label: gap of {gap:{form}} nats, {allowed:{form}} is the most"
    worst = min(assigned, key=evidence.words.__getitem__, default=None)
    if worst is not None and evidence.words[worst] < thresholds.min_word_llr:
        return f"a word lacks evidence: {evidence.words[worst]:.1f} nats for '{words[worst]}'"
    worst = min(assigned[:-1], key=evidence.order.__getitem__, default=None)
    if worst is not None and evidence.order[worst] < 0:
        return f"two words are likelier in reverse order: '{words[worst]} {words[worst + 1]}'"
    return None


def _segment(
    utterance_id: str, start: int, end: int, label: LabelDecision, forced: bool, by: str, labels: LabelPolicy
) -> Segment:
    refused = label.refused
    if refused is None and forced and by == "acoustic_model":
        refused = "a cut is outside any pause"
    if refused is None and frame_count(end - start) < labels.frames_needed(label.text):
        refused = "the label needs more frames than the segment has"
    return Segment(
        utterance_id,
        start / SAMPLE_RATE,
        end / SAMPLE_RATE,
        "" if refused else label.text,
        "unlabelled" if refused else "labelled",
        round(label.confidence, 4),
        forced,
        by,
        refused,
    )


def _compare_with_pass1(segment: Segment, pass1: LabelDecision) -> Segment:
    """Return the segment with the result of pass 1, if both passes assigned words."""
    if segment.label_status != "labelled" or not pass1.confidence:
        return segment
    return replace(segment, pass1=Pass1Label(round(pass1.confidence, 4), pass1.text == segment.text))


def _overlap(stretches: Sequence[Stretch], start: int, end: int) -> int:
    """Return the number of samples from `start` to `end` that lie in the stretches."""
    return sum(max(min(stretch.end, end) - max(stretch.start, start), 0) for stretch in stretches)
