"""Record whether a run has finished: its last act is to write which limit ended it and its best score."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from sharding.errors import StreamtrainError
from sharding.files.document import STRICT, DocumentError, Number, Size, parse, read_document
from sharding.files.writing import explaining, write_inside
from streamtrain.atomic import aside_of, move_aside, recover_replaced
from streamtrain.config import name_score

RESULT_NAME = "finished.json"
UNMIRRORED = "train.mirror lacks the newest checkpoint and best/, which this disk alone holds"
RESUME_HINT = "run the same training command again to resume from the newest checkpoint"

log = logging.getLogger("streamtrain")


@dataclass(frozen=True)
class RunResult:
    """Describe how a run ended. A run that was killed has no result, whatever the exit status of its launcher."""

    __pydantic_config__ = STRICT

    step: Size
    limit: str  # the setting that ended it, such as "train.max_steps=40"
    best_score: Number | None  # None if nothing was scored
    best_step: Size | None
    unmirrored: str | None = None  # why train.mirror lacks the run's end
    select: str = "cer"  # what `best_score` is: the run's `eval.select`

    def __str__(self) -> str:
        verdict = ": training did not improve the model" if self.best_step == 0 < self.step else ""
        best = "nothing was scored: best/ holds the last weights"
        if self.best_score is not None:
            name = name_score(self.select)
            best = f"best {name} {self.best_score:.4f} at step {self.best_step or 0:,}{verdict}"
        unmirrored_note = f"; {UNMIRRORED}: {self.unmirrored}" if self.unmirrored else ""
        return f"finished at step {self.step:,}, by {self.limit}; {best}{unmirrored_note}"


_RESULT = TypeAdapter(RunResult)


def write_result(run: Path, finish: RunResult) -> None:
    """Write atomically how a run ended."""
    write_inside(run / RESULT_NAME, json.dumps(asdict(finish)))


def read_result(run: Path) -> RunResult:
    """Return how a run ended. Raises StreamtrainError if it has not."""
    path = run / RESULT_NAME
    try:
        return parse(read_document(path), _RESULT)
    except FileNotFoundError:
        raise StreamtrainError(f"{run}: this run has not finished (it has no {RESULT_NAME})", RESUME_HINT) from None
    except DocumentError as error:
        raise StreamtrainError(f"{path}: damaged ({error})", RESUME_HINT) from error


@contextmanager
def reopened(run: Path) -> Iterator[None]:
    """Mark a finished run as unfinished while it is started again; restore its result if the start raises an error.

    The launcher of a killed run may return 0: later commands must not take the earlier end for this one's.
    """
    with explaining(run / RESULT_NAME):
        move_aside(run / RESULT_NAME)
    try:
        yield
    except (StreamtrainError, OSError):
        recover_replaced(run, RESULT_NAME)
        raise


def discard_result(run: Path) -> None:
    """Delete the result of a run that is about to change, so that no failed start restores it."""
    aside_of(run / RESULT_NAME).unlink(missing_ok=True)


def check_mirrored(run: Path, finish: RunResult) -> None:
    """Raise StreamtrainError if a finished run was to be copied to a mirror and the mirror is incomplete."""
    if finish.unmirrored is not None:
        hint = "keep the run folder; the same training command copies what is missing and ends without training"
        raise StreamtrainError(f"{run}: {UNMIRRORED}: {finish.unmirrored}", hint)


def warn_unless_finished(model: Path) -> None:
    """Warn if a model is the best so far of a run that has not finished."""
    run = model.resolve().parent
    if (run / "checkpoints").is_dir() and not (run / RESULT_NAME).is_file():
        log.warning("%s is the best model so far: its run has not finished; %s", model, RESUME_HINT)
