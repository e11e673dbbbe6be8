"""The processes of a run: who is who, what they agree on, and a clean end of all when one fails."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from coverfast.checks import InputError, printable, require

if TYPE_CHECKING:
    from torch import Tensor

_FAILED, _LEFT = "coverfast/failed", "coverfast/left"
#: Seconds for a process to end by itself once another one has failed; then it is ended.
_GRACE = 2.0


@dataclass(frozen=True)
class World:
    """Which process of the run it is; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place; nobody waits on the host."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def same(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


class StopVote:
    """Whether any process has been told to stop: all learn it at the same iteration, one late, and nobody waits."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, mine: int) -> int:
        """Give this process's signal (0: none), get the largest one that was given at the iteration before."""
        if self.world.size == 1:
            return mine
        import torch
        import torch.distributed as dist

        answer = self.close()
        votes = torch.tensor([mine])
        self._asked = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True), votes
        return answer

    def close(self) -> int:
        """The answer to the last question."""
        if self._asked is None:
            return 0
        work, votes = self._asked
        work.wait()
        self._asked = None
        return int(votes)


@contextmanager
def processes(timeout: float = 600.0, device: str = "auto") -> Iterator[World]:
    """The world of a run: what torchrun (or `RANK`, `WORLD_SIZE`, `MASTER_ADDR` ...) says, otherwise this process.

    A refusal or failure of one process ends all of them within seconds; only the first one is told. A process that does
    not answer for `timeout` seconds is one that failed. device: "cpu" leaves the GPUs alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    import torch
    import torch.distributed as dist

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    require(not missing, f"a run of WORLD_SIZE={size} processes needs {', '.join(missing)} as well; torchrun sets them")
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        require(
            world.local_rank < torch.cuda.device_count(),
            f"each process needs a GPU of its own, but there are {torch.cuda.device_count()} for process "
            f"{world.local_rank} of this machine (counted from 0); start fewer with --nproc-per-node",
        )
        torch.cuda.set_device(world.local_rank)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=limit)
    store = dist.distributed_c10d._get_default_store()
    ended = threading.Event()
    threading.Thread(target=_watch, args=(store, world, ended), daemon=True).start()
    try:
        yield world
        # Nobody leaves while another may still fail.
        dist.barrier()
        ended.set()
        dist.destroy_process_group()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        ended.set()
        code = _code(error)
        if code is None:  # all processes stop together
            raise
        told = _tell(store, world, error)
        sys.stdout.flush()
        if told:
            print(f"error: {printable(told)}", file=sys.stderr, flush=True)
        _leave_last(store, world)
        # Not through the interpreter's end: a collective that will never be answered would be waited for.
        os._exit(code)


def _code(error: BaseException) -> int | None:
    """What a process exits with; None where every process ends in the same way by itself."""
    return None if isinstance(error, (KeyboardInterrupt, SystemExit)) else 2


def _tell(store: Any, world: World, error: BaseException) -> str:
    """What this process has to say of its failure: nothing when another one has failed before."""
    lost = isinstance(error, RuntimeError) and not isinstance(error, InputError) and _speaks_of_others(str(error))
    if lost:
        time.sleep(1.0)  # the one that failed may be about to say why
    text = f"process {world.rank}: {error}"
    if lost:
        text = (
            f"process {world.rank}: another process of the run was lost or did not answer in time: {_sentence(error)}"
        )
    try:
        first = store.compare_set(_FAILED, "", text).decode() == text
    except Exception:  # the store went with the process that kept it
        first = True
    if first and not isinstance(error, InputError) and not lost:
        import traceback

        traceback.print_exception(error)
    return text if first else ""


def _leave_last(store: Any, world: World) -> None:
    """The first process keeps the store: it gives the others time to read there who has failed."""
    deadline = time.monotonic() + 2 * _GRACE
    try:
        if world.rank:
            store.add(_LEFT, 1)
            return
        while store.add(_LEFT, 0) < world.size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
    except Exception:  # the store went with the process that kept it
        return


def _speaks_of_others(message: str) -> bool:
    words = ("Connection closed by peer", "Timed out waiting", "Connection reset", "Broken pipe", "gloo", "NCCL")
    return any(word in message for word in words)


def _sentence(error: BaseException) -> str:
    """The first sentence, without the place in torch's sources."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^\[\S+\] *", "", line).partition(". ")[0]


def _watch(store: Any, world: World, ended: threading.Event) -> None:
    """End this process soon after another one has failed: it may be waiting for an answer that will not come."""
    while not ended.wait(1.0):
        try:
            failed = store.check([_FAILED])
        except Exception:  # the store went with the process that kept it
            failed = True
        if failed:
            if not ended.wait(_GRACE):
                _leave_last(store, world)
                os._exit(2)
            return
