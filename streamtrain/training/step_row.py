"""Describe what a run logs of a step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRow:
    """Describe one optimizer step, a row of log.csv."""

    step: int
    epoch: int
    loss: float  # nats per label symbol, over the whole step
    lr: float
    grad_norm: float
    seconds: float  # duration of the step, waiting included
    audio_sec_per_sec: float  # true seconds of speech trained on, per second
    padding: float  # 1 − true ÷ padded seconds
    data_wait: float  # share of the step spent waiting for data, by the rank that waited longest
    silent: int  # clips that did not decode, on all ranks
    skipped: int  # 1 if the gradient was not finite, so that the step changed nothing
    # If an evaluation followed the step, and in as far as the labels allow it
    eval_loss: float | None = None  # nats per label symbol
    eval_per: float | None = None
    eval_wer: float | None = None
    eval_cer: float | None = None
    eval_score: float | None = None  # by which best/ is chosen: `eval.select`
    eval_runtime: float | None = None  # s

    @property
    def scored(self) -> bool:
        """Return whether an evaluation followed the step."""
        return self.eval_runtime is not None
