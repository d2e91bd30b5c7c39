"""Probe the memory before the first step, by running the plan's largest batches, so that a run fails early."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import torch

from sharding.audio.codec import SAMPLE_RATE
from sharding.errors import StreamtrainError, counted
from streamtrain.data.collate import Batch
from streamtrain.data.loader import NOTHING_AHEAD, LoaderMemory
from streamtrain.data.plan import EpochPlan
from streamtrain.distributed import World
from streamtrain.model.batches import batch_by_length

USABLE = 0.92  # of the memory: other shapes leave gaps, and so do allocators
GIB = 2**30

Run = Callable[[Batch], None]  # forward and backward of a batch


class ProbeError(StreamtrainError):
    """Report a batch that does not fit the memory."""


@dataclass(frozen=True)
class Shape:
    """Describe the name and size of a batch that one forward pass takes."""

    name: str
    clips: int
    samples: int  # of the longest clip
    symbols: int  # of the longest label

    @property
    def seconds(self) -> float:
        """Return its length, padding included."""
        return self.clips * self.samples / SAMPLE_RATE

    def __str__(self) -> str:
        return f"{self.name}: {counted(self.clips, 'clip')} of up to {self.samples / SAMPLE_RATE:.1f} s"


@dataclass(frozen=True)
class Memory:
    """Model the memory of one rank, in bytes, as a fitted line: `base` + `per_second` × padded seconds."""

    limit: int
    base: float
    per_second: float

    def at(self, seconds: float) -> float:
        return self.base + self.per_second * seconds

    @property
    def largest(self) -> float:
        """Return the padded seconds that fit."""
        return max(USABLE * self.limit - self.base, 0.0) / max(self.per_second, 1.0)


def largest_shapes(plan: EpochPlan, symbols: int, device_batch_seconds: float | None) -> list[Shape]:
    """Return the micro-batches with the longest clip and with most padded seconds, as large as merging makes them."""
    shapes = []
    whole_step = int(plan.clips.sum(axis=1).max())
    for name, sizes in (("the longest", plan.longest), ("the densest", plan.padded)):
        step, number = divmod(int(sizes.argmax()), plan.micro_batches_per_step)
        samples = int(plan.longest[step, number])
        merged = round((device_batch_seconds or 0) * SAMPLE_RATE) // samples
        clips = max(int(plan.clips[step, number]), min(merged, whole_step))
        shapes.append(Shape(f"{name} micro-batch (number {number + 1} of step {step + 1})", clips, samples, symbols))
    return shapes


def evaluation_shapes(lengths: npt.NDArray[np.integer], batch_seconds: float) -> list[Shape]:
    """Return the evaluation batch with the longest clip and that with most padded seconds."""
    sizes = [(len(batch), int(lengths[batch].max())) for batch in batch_by_length(lengths, batch_seconds)]
    longest, densest = max(sizes, key=lambda size: size[1]), max(sizes, key=lambda size: size[0] * size[1])
    return [Shape(f"the {name} batch of the evaluation", clips, samples, 1)
            for name, (clips, samples) in (("longest", longest), ("densest", densest))]  # fmt: skip


def probe(run: Run, shapes: list[Shape], world: World, loader: LoaderMemory = NOTHING_AHEAD) -> Memory:
    """Run each shape, with fewer clips first, and return the fitted memory. All ranks call it together.

    Raise ProbeError if a shape does not fit, or if the batches loaded ahead do not.
    """
    largest = max(shapes, key=lambda shape: shape.seconds)
    _check_loader(loader.at(largest.seconds), world)
    host_loader = loader if world.device.type == "cpu" else NOTHING_AHEAD  # on CPU it takes the same memory
    limit = _limit(world)
    baseline = _peak_of(run, replace(shapes[0], clips=1), Memory(limit, 0.0, 0.0), world)  # libraries allocate once
    memory = Memory(limit, baseline, 0.0)
    measured: list[tuple[float, float]] = []
    for shape in shapes:
        doubling = [2**power for power in range((shape.clips - 1).bit_length())]
        for clips in (*doubling, shape.clips):  # so that each size predicts the next
            smaller = replace(shape, clips=clips)
            if world.device.type == "cpu" and memory.at(smaller.seconds) > limit:
                raise _does_not_fit(smaller, memory)  # on CPU nothing raises: the kernel kills the process
            measured.append((smaller.seconds, _peak_of(run, smaller, memory, world) + host_loader.at(smaller.seconds)))
            memory = _line_through(measured, limit)
    if host_loader.batches and memory.at(largest.seconds) > limit:
        raise _does_not_fit(largest, memory)
    return memory


def _check_loader(needed: float, world: World) -> None:
    """Raise ProbeError if the batches loaded ahead need more than the rank's share of the host's memory."""
    share = _host_share(world)
    if needed > share:
        raise ProbeError(
            f"the batches that are loaded ahead take up to {needed / GIB:.2f} GiB, {share / GIB:.2f} GiB of this "
            "machine's memory are left for this rank",
            "lower data.workers, or the size of a batch: data.batch_seconds and data.device_batch_seconds",
        )


def _line_through(measured: list[tuple[float, float]], limit: int) -> Memory:
    """Fit a line through the smallest and the largest forward pass, by seconds."""
    (least, low), (most, high) = min(measured), max(measured)
    slope = max(high - low, 0.0) / (most - least) if most > least else 0.0
    return Memory(limit, high - slope * most, slope)


def render(memory: Memory, shapes: list[Shape], loader: LoaderMemory = NOTHING_AHEAD) -> str:
    """Return one line for the log of a run."""
    largest = max(shapes, key=lambda shape: shape.seconds)
    return (
        f"memory: {memory.at(largest.seconds) / GIB:.2f} of {memory.limit / GIB:.1f} GiB that a rank has, for {largest}"
        f"; batches loaded ahead take up to {loader.at(largest.seconds) / GIB:.2f} GiB of the host's"
    )


def _does_not_fit(shape: Shape, memory: Memory) -> ProbeError:
    longest, fits = shape.samples / SAMPLE_RATE, int(memory.largest) if memory.per_second else 0
    hint = f"data.batch_seconds={fits} would fit (and data.device_batch_seconds, if it is set)"
    if fits < longest:
        hint = "model.gradient_checkpointing=true takes less, and so do shards built with a lower --max-duration"
    return ProbeError(f"{shape}: more than the {memory.limit / GIB:.1f} GiB of memory that a rank has", hint)


def _peak_of(run: Run, shape: Shape, memory: Memory, world: World) -> int:
    """Return the peak memory of this rank, in bytes, when it runs noise of a shape."""
    _reset_peak(world)
    try:
        run(_noise(shape))
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and a CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise _does_not_fit(shape, memory) from error
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return _status("VmHWM")


def _noise(shape: Shape) -> Batch:
    """Return noise of a shape, at weight 0, so that its gradient is 0."""
    random = torch.Generator().manual_seed(0)
    return Batch(
        inputs=torch.randn(shape.clips, shape.samples, generator=random),
        input_lengths=torch.full((shape.clips,), shape.samples),
        targets=torch.ones(shape.clips, shape.symbols, dtype=torch.int64),
        target_lengths=torch.full((shape.clips,), shape.symbols),
        weights=torch.zeros(shape.clips),
        keys=("",) * shape.clips,
    )


def _reset_peak(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _limit(world: World) -> int:
    """Return the bytes that this rank may use, of its GPU or of the host."""
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        return int(free + torch.cuda.memory_reserved(world.device))
    return _status("VmRSS") + _host_share(world)


def _host_share(world: World) -> int:
    """Return the bytes that this rank may still take of what the machine or its container has left."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        taken = int((group / "memory.current").read_text()) - _file_cache(group)
        free = min(free, int((group / "memory.max").read_text()) - taken)
    return int(free / max(world.local_size, 1))


def _file_cache(group: Path) -> int:
    """Return the bytes of file cache that a container's kernel frees if they are needed."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat["inactive_file"]) + int(stat["active_file"])
