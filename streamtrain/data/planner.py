"""Plan the epochs of a large shard set once per machine, in a process beside the ranks, which map the plan's pages.

A plan of ten million clips takes two seconds, and a gigabyte for a moment: not in a rank that feeds a GPU, and not in
each of eight. Of small sets, every rank makes the same plan at once.
"""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import xxhash

from sharding.errors import StoreError, StreamtrainError
from sharding.files.spool import share_array
from sharding.pool import available_cores, die_with_parent
from sharding.shardset.index import INDEX_NAME, ShardIndex, read_index, read_index_header
from sharding.shardset.store import Store
from streamtrain.data.plan import (
    PLANNER_VERSION,
    EpochPlan,
    PlanPrefix,
    PlanSettings,
    count_steps,
    plan_remaining,
)
from streamtrain.distributed import World

MANY_CLIPS = 2**18  # from which on an index and its plans are shared between the ranks of a machine
VARIABLE = "STREAMTRAIN_MANY_CLIPS"  # in the environment: another number
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # the rank handles these


class PlannerError(StreamtrainError):
    """Report a planning process that exited."""


def read_shared_index(store: Store, world: World, name: str = INDEX_NAME) -> ShardIndex:
    """Read an index; of a large one, the ranks of a machine map one table. All ranks must call it together.

    Raises ShardError and StoreError, on all ranks.
    """
    header = read_index_header(store, name)
    if sum(shard.count for shard in header.shards) < many_clips():
        return read_index(store, name)
    return replace(header, samples=_share(lambda: share_array(read_index(store, name).samples), world))


def many_clips() -> int:
    return int(os.environ.get(VARIABLE, MANY_CLIPS))


def leader_of(world: World) -> int:
    """Return the first rank of this rank's machine."""
    return min(world.neighbours, default=world.rank)


def _share(make: Callable[[], Any], world: World) -> Any:
    """Return what `make` returns on the first rank of each machine, on all of its ranks. Errors are raised on all.

    It is pickled and sent to all ranks of all machines, so that all but shared arrays must be small.
    """
    leader, made = leader_of(world), None
    packed: bytes | StreamtrainError = b""
    if leader == world.rank:
        try:
            made = make()
            packed = pickle.dumps(made)
        except StreamtrainError as error:
            packed = error
    gathered = world.gather(packed)
    for failure in gathered:
        if isinstance(failure, StreamtrainError):
            raise failure
    if leader != world.rank:
        try:
            made = pickle.loads(gathered[leader])  # only the files of this machine's leader are here
        except StoreError:  # it is in a container of its own
            made = make()
    world.barrier()  # the leader keeps them open until all have opened them
    return made


class Planner:
    """Plan epochs of an index, the same on every rank. All ranks must call `plan` and `count` together."""

    def __init__(self, index: ShardIndex, settings: PlanSettings, world: World) -> None:
        self._index, self._settings, self._world = index, settings, world
        self._apart = len(index.samples) >= many_clips()
        self._begun: tuple[int, Apart] | None = None
        self.counted: dict[int, int] = {}  # steps by epoch, on rank 0

    @property
    def key(self) -> str:
        """Return a digest of all that determines the steps of an epoch."""
        share = None if self._index.share is None else xxhash.xxh3_128_hexdigest(self._index.share.tobytes())
        return xxhash.xxh3_128_hexdigest(repr((self._index.digest, self._settings, PLANNER_VERSION, share)).encode())

    def begin(self, epoch: int) -> None:
        """Begin to plan an epoch that will be asked for, if it takes long."""
        if self._apart and leader_of(self._world) == self._world.rank:
            self._begun = epoch, Apart(_plan_shared, self._index, self._settings, epoch, ())

    def plan(self, epoch: int, completed: Sequence[PlanPrefix] = ()) -> EpochPlan:
        """Return the plan of an epoch, or of what is left of it. Raises PlanError on every rank."""
        if not self._apart:
            return plan_remaining(self._index, self._settings, epoch, completed)
        plan: EpochPlan = _share(lambda: self._plan_apart(epoch, completed), self._world)
        return plan

    def _plan_apart(self, epoch: int, completed: Sequence[PlanPrefix]) -> EpochPlan:
        begun, self._begun = self._begun, None
        if begun is not None and (begun[0] != epoch or completed):
            begun[1].close()
            begun = None
        apart = begun[1] if begun else Apart(_plan_shared, self._index, self._settings, epoch, completed)
        plan: EpochPlan = apart.result()
        return plan

    def count(self, epochs: Sequence[int]) -> list[int]:
        """Return the steps of each of these epochs."""
        if not self._apart:
            return [count_steps(self._index, self._settings, epoch) for epoch in epochs]
        with self._world.on_main("count the steps of the epochs") as is_main:
            missing = [epoch for epoch in epochs if epoch not in self.counted] if is_main else []
            parts = [missing[number :: available_cores()] for number in range(available_cores())]
            begun = [(part, Apart(_count_all, self._index, self._settings, part)) for part in parts if part]
            for part, apart in begun:
                self.counted |= zip(part, apart.result(), strict=True)
        counts: list[int] = self._world.gather([self.counted[epoch] for epoch in epochs] if self._world.main else [])[0]
        return counts

    def close(self) -> None:
        """End a process that plans an epoch which is not needed."""
        if self._begun is not None:
            self._begun[1].close()
            self._begun = None


class Apart:
    """Run a function in a process of its own; what it returns may be in shared arrays."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(target=_work, args=(child_end,), daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited, until the process ignores them
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child_end.close()  # so that this process gets EOF if the other exits
        with suppress(OSError):  # it exited: `result` tells
            self._connection.send((function, arguments))

    def result(self) -> Any:
        """Return what the function returned. Raises the StreamtrainError that it raised."""
        try:
            made = self._connection.recv()  # opens the files of shared arrays, which the process then closes
        except (EOFError, OSError) as error:
            raise PlannerError("a planning process exited", "was it killed for lack of memory?") from error
        finally:
            self.close()
        if isinstance(made, StreamtrainError):
            raise made
        return made

    def close(self) -> None:
        self._connection.close()
        self._process.join(0.0 if self._process.exitcode is not None else 1.0)
        if self._process.is_alive():  # it still plans
            self._process.kill()
            self._process.join()


def _work(connection: Connection) -> None:
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, OSError):  # the rank has ended, or does not need the result
        function, arguments = connection.recv()
        try:
            result = function(*arguments)
        except StreamtrainError as error:
            result = error
        connection.send(result)
        connection.recv()  # until the rank has opened the files


def _plan_shared(index: ShardIndex, settings: PlanSettings, epoch: int, completed: Sequence[PlanPrefix]) -> EpochPlan:
    return plan_remaining(index, settings, epoch, completed).shared()


def _count_all(index: ShardIndex, settings: PlanSettings, epochs: Sequence[int]) -> list[int]:
    return [count_steps(index, settings, epoch) for epoch in epochs]
