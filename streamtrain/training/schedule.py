"""Schedule learning rates by step, by layer, and for an encoder that is frozen at first."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from streamtrain.config import TrainConfig
from streamtrain.model.ctc import CTCModel

HOLD_SHARE = 0.4  # of all steps, in tri-stage (Baevski et al. 2020)
TRI_STAGE_END = 0.05  # of the peak: an exponential never reaches 0


@dataclass(frozen=True)
class Schedule:
    """Describe the learning rate of every step as a share of its peak, over the exact number of steps."""

    kind: str
    warmup_steps: int
    hold_steps: int  # at the peak, in tri-stage
    total_steps: int
    end: float  # share of the peak that is reached after the last step

    def at(self, step: int) -> float:
        """Return the share at optimizer step `step`, counted from 0: a linear warm-up, then as `kind` defines."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        begin = self.warmup_steps + self.hold_steps * (self.kind == "tri-stage")
        left = min((self.total_steps - step) / max(self.total_steps - begin, 1), 1.0)  # 1 → 0
        if self.kind == "linear":
            return self.end + (1 - self.end) * left
        if self.kind == "cosine":
            return self.end + (1 - self.end) * (1 - math.cos(math.pi * left)) / 2
        return float(self.end ** (1 - left))


@dataclass(frozen=True, eq=False)
class ParamGroup:
    """Hold parameters that have the same learning rate."""

    parameters: list[nn.Parameter]
    peak: float  # learning rate
    first_step: int = 0  # until then they are frozen


@dataclass(frozen=True, eq=False)
class LRSchedule:
    """Hold the parameter groups of a model and their learning rates by step."""

    groups: list[ParamGroup]
    schedule: Schedule

    @property
    def learning(self) -> int:
        """Return the number of trainable weights."""
        return sum(parameter.numel() for group in self.groups for parameter in group.parameters)

    def rates(self, step: int) -> list[float]:
        """Return the learning rate of each group at optimizer step `step`, counted from 0."""
        return [group.peak * self.schedule.at(step) * self._thawed(group, step) for group in self.groups]

    def _thawed(self, group: ParamGroup, step: int) -> float:
        """Return the share of a warm-up after thawing: Adam's bias correction is over, so steps would be too large."""
        if group.first_step == 0:
            return 1.0
        return min(1.0, max(0, step + 1 - group.first_step) / max(self.schedule.warmup_steps, 1))


def make_schedule(model: CTCModel, settings: TrainConfig, peak: float, total_steps: int) -> LRSchedule:
    """Group parameters by learning rate: by layer if rates differ, otherwise in one group. `peak` is the encoder's."""
    tri_stage = settings.schedule == "tri-stage"
    hold = settings.hold_steps if settings.hold_steps is not None else round(HOLD_SHARE * total_steps)
    end = settings.final_lr_ratio if settings.final_lr_ratio is not None else TRI_STAGE_END * tri_stage
    schedule = Schedule(settings.schedule, settings.warmup_steps, hold, total_steps, end)
    head = settings.head_lr or peak
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for depth, parameter in _by_depth(model):
        below = model.layers + 1 - depth  # layers between it and the head
        rate = head if below == 0 else peak * settings.layer_decay ** (below - 1)
        frozen = settings.freeze_encoder_steps if below else 0
        groups.setdefault((rate, frozen), []).append(parameter)
    return LRSchedule([ParamGroup(parameters, rate, first) for (rate, first), parameters in groups.items()], schedule)


def _by_depth(model: CTCModel) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield every trainable parameter with its depth: 0 below the first layer, 1 … N within them, N + 1 the head."""
    for name, parameter in model.network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.search(r"\.encoder\.layers\.(\d+)\.", name)
        if layer:
            yield int(layer[1]) + 1, parameter
        else:
            yield 0 if name.startswith(f"{model.network.base_model_prefix}.") else model.layers + 1, parameter
