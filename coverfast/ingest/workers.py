"""A few processes that work through a long list, and say at what they died."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, TypeVar, cast

from coverfast.checks import InputError, require
from coverfast.machine import usable_cores

Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_count(workers: int | None) -> int:
    """The number of processes to start: as given, by default all cores but one; at least 1, 0 only if given."""
    ok = workers is None or (isinstance(workers, int) and not isinstance(workers, bool) and 0 <= workers <= 1024)
    require(ok, f"workers must be an int from 0 to 1024, got {workers!r}")
    if workers is not None:
        return workers
    return max(1, usable_cores() - 1)


class Workers(Generic[Task, Result]):
    """`with Workers(2, work) as workers: for task, result in workers.map(tasks): ...`

    work: a function that pickles, from task to result. Each process has one task at a time and tasks are drawn as they
    are needed, so that a list of any length takes the same memory. count: 0 works in this process. Results come as
    they are done. start: called first in each process.
    """

    def __init__(self, count: int, work: Callable[[Task], Result], start: Callable[[], object] = int) -> None:
        self._count, self._work, self._start = count, work, start
        self._workers: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Workers[Task, Result]:
        # Spawned: a fork of a process with threads, as any with torch or HDF5 is, may hang.
        context = multiprocessing.get_context("spawn")
        try:
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._work, self._start), daemon=True)
                process.start()
                theirs.close()  # so that its death ends our side
                self._workers[ours] = process
            for connection in self._workers:
                try:
                    connection.recv()
                except EOFError:
                    raise InputError(
                        "worker processes must be able to import the main script: call build_shard below "
                        "`if __name__ == '__main__':`, or with workers=0"
                    ) from None
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for process in self._workers.values():
            process.kill()
        for connection, process in self._workers.items():
            process.join()
            connection.close()
        self._workers.clear()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Work through `tasks`; `InputError` names the task a process died at, RuntimeError tells what it raised."""
        if not self._workers:
            for task in tasks:
                yield task, self._work(task)
            return
        waiting = iter(tasks)
        busy: dict[Connection, Task] = {}

        def give(connection: Connection) -> None:
            for task in waiting:
                busy[connection] = task
                with _dying(self._workers[connection], task):
                    connection.send(task)
                return

        for connection in self._workers:
            give(connection)
        while busy:
            for ready in cast(list[Connection], multiprocessing.connection.wait(list(busy))):
                with _dying(self._workers[ready], busy[ready]):
                    ok, result = ready.recv()
                task = busy.pop(ready)
                if not ok:
                    raise RuntimeError(f"a worker failed at {task}:\n{result}")
                give(ready)
                yield task, result


@contextlib.contextmanager
def _dying(process: BaseProcess, task: object) -> Iterator[None]:
    """Turn the end of a worker's connection into a sentence that names the task."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join(10)
        code = process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        why = ", perhaps for lack of memory" if code == -9 else ""
        raise InputError(f"{task} was being read when its worker process was {how}{why}") from None


def _serve(connection: Connection, work: Callable[[Task], Result], start: Callable[[], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_follow, daemon=True).start()
    start()
    connection.send(None)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, work(task)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _follow() -> None:
    """Die with the parent: an orphan would write beside the next builder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
