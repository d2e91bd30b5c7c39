"""Whether a run has come to its end: its last act is to write which limit ended it, and what was reached."""

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

RESULT_NAME = "finished.json"
UNMIRRORED = "train.mirror lacks the newest checkpoint and best/, which this disk alone holds"
RESUME_HINT = "the same training command goes on from the newest checkpoint"

log = logging.getLogger("streamtrain")


@dataclass(frozen=True)
class RunResult:
    """How a run ended. One that was killed has none, whatever the exit status of its launcher."""

    __pydantic_config__ = STRICT

    step: Size
    limit: str  # the setting that ended it, such as "train.max_steps=40"
    best_cer: Number | None  # None where nothing was scored
    best_step: Size | None
    unmirrored: str | None = None  # why train.mirror lacks the run's end

    def __str__(self) -> str:
        verdict = ": training did not improve the model" if self.best_step == 0 < self.step else ""
        best = "nothing was scored: best/ holds the last weights"
        if self.best_cer is not None:
            best = f"best CER {self.best_cer:.4f} at step {self.best_step or 0:,}{verdict}"
        lacking = f"; {UNMIRRORED}: {self.unmirrored}" if self.unmirrored else ""
        return f"finished at step {self.step:,}, by {self.limit}; {best}{lacking}"


_FINISH = TypeAdapter(RunResult)


def write_result(run: Path, finish: RunResult) -> None:
    """Write how a run ended, whole or not at all."""
    write_inside(run / RESULT_NAME, json.dumps(asdict(finish)))


def read_result(run: Path) -> RunResult:
    """Return how a run ended. Raise StreamtrainError if it has not."""
    path = run / RESULT_NAME
    try:
        return parse(read_document(path), _FINISH)
    except FileNotFoundError:
        raise StreamtrainError(f"{run}: this run has not finished (it has no {RESULT_NAME})", RESUME_HINT) from None
    except DocumentError as error:
        raise StreamtrainError(f"{path}: damaged ({error})", RESUME_HINT) from error


@contextmanager
def reopened(run: Path) -> Iterator[None]:
    """Have a finished run count as unfinished as soon as it is started again, unless that start fails in words.

    The launcher of a run that is killed may return 0: what follows must not take the earlier end for this one's.
    """
    with explaining(run / RESULT_NAME):
        move_aside(run / RESULT_NAME)
    try:
        yield
    except (StreamtrainError, OSError):
        recover_replaced(run, RESULT_NAME)
        raise


def discard_result(run: Path) -> None:
    """Forget how a run ended, as it is about to change: from now on no failed start brings that back."""
    aside_of(run / RESULT_NAME).unlink(missing_ok=True)


def check_mirrored(run: Path, finish: RunResult) -> None:
    """Raise StreamtrainError if a run that has finished was to be copied to a mirror, and is not there."""
    if finish.unmirrored is not None:
        hint = "keep the run folder; the same training command copies what is missing, trains no more, and ends"
        raise StreamtrainError(f"{run}: {UNMIRRORED}: {finish.unmirrored}", hint)


def warn_unless_finished(model: Path) -> None:
    """Warn that a model is the best so far of a run that has not finished."""
    run = model.resolve().parent
    if (run / "checkpoints").is_dir() and not (run / RESULT_NAME).is_file():
        log.warning("%s is the best model so far: its run has not finished; %s", model, RESUME_HINT)
