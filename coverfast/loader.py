"""From shards to the training device: reading processes, pinned memory, scaling to [0, 1]."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from coverfast.checks import InputError, per_axis, require
from coverfast.geometry import Size
from coverfast.image_stream import SMALL, to_unit_range
from coverfast.image_stream import Images as Images
from coverfast.image_stream import ImageStream as ImageStream
from coverfast.image_stream import RandomCrops as RandomCrops
from coverfast.machine import usable_cores
from coverfast.shard_set import PathLike, ShardSet


def to_device(batch: Images, device: torch.device) -> Images:
    """The images as they are stored to the device, there to [0, 1]; labels and targets as they are."""
    images = to_unit_range(batch.images.to(device, non_blocking=True), batch.scaling)
    for axis, size in enumerate(images.shape[2:]):
        if bool((batch.extents[:, axis] < size).any()):
            inside = torch.arange(size) < batch.extents[:, axis, None]
            shape = [len(images), 1, *(size if i == axis else 1 for i in range(images.ndim - 2))]
            images *= inside.to(device, non_blocking=True).reshape(shape)
    labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
    return batch._replace(images=images, labels=labels, targets=batch.targets.to(device, non_blocking=True))


class _Iterations:
    def __init__(self, first: int, last: int | None) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        iteration = self.first
        while self.last is None or iteration <= self.last:
            yield iteration
            iteration += 1


def load_batches(
    stream: ImageStream,
    *,
    first: int = 1,
    last: int | None = None,
    workers: int = 0,
    device: torch.device | str | None = "cpu",
    start_method: str | None = None,
) -> Iterator[Images]:
    """Batches `first .. last` (None: without end), on `device` in [0, 1], or on the host as they are stored (None).

    workers: reading processes; 0 reads in this one. start_method: "fork", "spawn", "forkserver" or None for Python's
    choice. On a GPU the next batch is copied from pinned memory while this one is worked on. `InputError`: a sample
    that cannot be read, unless the stream skips it, and a reading process that died.
    """
    fits = isinstance(first, int) and first >= 1 and (last is None or isinstance(last, int))
    require(fits, f"first must be an int of at least 1 and last an int or None, got {first!r} and {last!r}")
    require(isinstance(workers, int) and workers >= 0, f"workers must be an int of at least 0, got {workers!r}")
    device = None if device is None else torch.device(device)
    gpu = device is not None and device.type == "cuda"
    require(not gpu or torch.cuda.is_available(), f"device must be one that is there, but torch finds no GPU: {device}")
    loader = DataLoader(
        stream,
        batch_size=None,
        collate_fn=_as_it_is,
        sampler=_Iterations(first, last),
        num_workers=workers,
        pin_memory=gpu,
        worker_init_fn=_begin_reading,
        multiprocessing_context=start_method if workers else None,
    )
    sound = _sound(loader)
    yield from sound if device is None else _ahead(sound, device)


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_reading(worker: int) -> None:
    """In a reading process: let it end with the main process, and not before.

    What asks a run to stop may reach all its processes, but the main one decides, and needs batches until it has.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    # torch's worker looks for its parent too, but that may be Python's fork server, and it cannot leave while what it
    # has read fills a pipe that nobody empties.
    main, parent = multiprocessing.parent_process(), os.getppid()
    assert main is not None
    while main.is_alive() and os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):
            main.join(1.0)
        elif (told := signal.sigtimedwait({signal.SIGTERM}, 1.0)) and told.si_pid == main.pid:
            break
    os._exit(1)


def _sound(loader: Iterable[Images | InputError]) -> Iterator[Images]:
    batches: Iterator[Images | InputError] = iter(())
    try:
        batches = iter(loader)
        for batch in batches:
            if isinstance(batch, InputError):
                raise batch
            small: dict[str, Any] = {name: torch.from_numpy(getattr(batch, name)) for name in SMALL}
            yield batch._replace(**small)
    except (EOFError, ConnectionError, FileNotFoundError, RuntimeError) as error:
        # The signal of a process's death may still be on its way, and torch raises wherever it arrives.
        with contextlib.suppress(RuntimeError):
            time.sleep(0.5)
        if lost := lost_reader(error):
            raise lost from error
        raise
    finally:
        # A garbage collector may close the queues to the processes first: each would then be waited for for 5 s.
        if end := getattr(batches, "_shutdown_workers", None):
            end()


def lost_reader(error: BaseException) -> InputError | None:
    """The refusal if an error means that a reading process has died; torch may raise it anywhere in the main thread."""
    # What a process raised is told as "in DataLoader worker process 0", its death as "DataLoader worker (pid ...".
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
        return None
    if "in DataLoader worker process" in str(error):
        return None
    return InputError(
        "reading processes must live as long as the run, but one ended (too little memory, or a script without "
        f"`if __name__ == '__main__':`?): {error or type(error).__name__}"
    )


def _ahead(batches: Iterator[Images], device: torch.device) -> Iterator[Images]:
    """Batches on the device; on a GPU each is on its way there while the one before is worked on."""
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Images, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = to_device(batch, device), stream.record_event()
        if waiting:
            yield _arrived(*waiting)
        waiting = moved
    if waiting:
        yield _arrived(*waiting)


def _arrived(batch: Images, event: torch.cuda.Event) -> Images:
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(event)
    for moved in (batch.images, batch.labels, batch.targets):
        if moved is not None:
            moved.record_stream(current)
    return batch


def crop_loader(
    data: PathLike | list[PathLike],
    crop: Size,
    *,
    batch: int,
    seed: int = 0,
    split: str = "train",
    crops: int = 1,
    foreground: float = 0.0,
    first: int = 1,
    last: int | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    on_bad_sample: str = "stop",
    labels: bool = False,
) -> Iterator[Images]:
    """Random crops of the samples of shards, for a training loop of your own; see `ShardSet` and `ImageStream`.

    crop: an int or one per axis. Yields `Images` with float32 images `(batch / world, C, *crop)` in [0, 1] on `device`,
    smaller images zero-filled. labels: with the class indices of the same crops, `(batch / world, *crop)` uint8, 0
    where there is no image; the shards must have label maps. Begin at `first` to go on where another run stopped.
    """
    shards = ShardSet(data, split)
    size = per_axis("crop", crop, shards.ndim)
    stream = ImageStream(
        shards,
        batch=batch,
        seed=seed,
        regions=RandomCrops(size),
        least=size,
        crops=crops,
        foreground=foreground,
        rank=rank,
        world=world,
        on_bad_sample=on_bad_sample,
        labels=labels,
    )
    return load_batches(stream, first=first, last=last, workers=workers, device=device)


def reading_processes(device: torch.device) -> int:
    """How many processes to read with: the cores but one, at most eight, for a GPU; none where the CPU trains."""
    return min(8, max(1, usable_cores() - 1)) if device.type == "cuda" else 0
