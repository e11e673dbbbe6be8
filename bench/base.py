"""Another version of this library beside this one: the same benchmark, in turn with ours, from a git revision.

The revision is checked out into a temporary worktree and runs in a process of its own. The code of the benchmark is
this one's in both, so that only the library differs.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from coverfast.bench.measure import Elsewhere, NoRoom, clock_ms, event_ms, reason
from coverfast.bench.prepared import Here, Prepared, Runs
from coverfast.bench.problems import Case
from coverfast.checks import InputError, require

#: The folders of a clone that install inside the package, by the name that they have there.
_INSIDE = ("kernels", "cli")
_HERE = Path(__file__).resolve().parent
#: Run by Python as it begins. An editable installation finds what a revision lacks: in the library of today.
_ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable___coverfast")]
"""


@contextmanager
def versions(revision: str) -> Iterator[tuple[Revision, Revision]]:
    """The library as it is, and at a git revision of the clone that this code runs from: each in a process of its own,
    for one that ran in this process would be called with warmer caches.

    Raises:
        InputError: where this is no clone, there is no such revision, or the benchmark does not run with it.
    """
    root = _HERE.parent
    require((root / ".git").exists() and (root / "bench") == _HERE, "--base needs the library installed from a clone")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}")
    require(bool(commit), f"base must be a git revision of the clone in use, got {revision!r}")
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        _git(root, "worktree", "add", "--detach", str(tree), commit)
        require((tree / "coverfast").is_dir(), f"base must be a revision that git can check out here, got {revision!r}")
        sites = {"": root, commit: tree}
        try:
            with ExitStack() as stack:
                found = []  # both begin before either is waited for
                for number, (name, source) in enumerate(sites.items()):
                    site = _link(source, Path(place) / str(number))
                    found.append((name, stack.enter_context(_child(site)), _said(site)))
                mine, theirs = (Revision(*version) for version in found)
                yield mine, theirs
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()


def _link(tree: Path, site: Path) -> Path:
    """The package as it would be installed: the library of the revision, the benchmarks of today."""
    package = site / "coverfast"
    package.mkdir(parents=True)
    for entry in (tree / "coverfast").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in _INSIDE:
        (package / name).symlink_to(tree / name)
    (package / "bench").symlink_to(_HERE)
    (site / "sitecustomize.py").write_text(_ALONE)
    return site


@contextmanager
def _child(site: Path) -> Iterator[subprocess.Popen[bytes]]:
    path = os.pathsep.join([str(site), *(p for p in sys.path if p and Path(p).resolve() != _HERE.parent)])
    command = [sys.executable, "-c", "from coverfast.bench.base import serve; serve()"]
    # Begun elsewhere: the folder that a process starts in would be looked through first.
    options: dict[str, Any] = {"env": os.environ | {"PYTHONPATH": path}, "cwd": site}
    with (
        _said(site).open("wb") as said,  # a pipe that nobody reads would fill up
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, **options) as process,
    ):
        try:
            yield process
        finally:
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            process.terminate()


def _said(site: Path) -> Path:
    """What a process says beside its answers."""
    return site / "said.txt"


class Revision:
    """The library at a revision, the one of this code without a name, in its process. See `prepared.Version`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], said: Path) -> None:
        self.name, self._process, self._said = name, process, said
        self.forget()  # it has begun when it answers

    def ask(self, what: str, *arguments: Any) -> Any:
        """What its process answers."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        try:
            pickle.dump((what, arguments), to)
            to.flush()
            answer, failed = pickle.load(back)
        except (OSError, EOFError):
            code = self._process.wait()
            lines = self._said.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else f"its process ended with {code}"
            raise InputError(
                f"base must be a revision that today's benchmarks run with, got {self.name}: {last}"
            ) from None
        if failed:
            raise answer
        return answer

    def forget(self) -> None:
        """All cases so far, and the memory that they hold."""
        self.ask("forget")

    def prepared(self, case: Case, device: str, dtype: torch.dtype) -> Prepared:
        """A case there."""
        return There(self, self.ask("prepare", case, device, dtype), case.checked or dtype)


class There:
    """A case in the process of a `Revision`. See `prepared.Prepared`."""

    def __init__(self, revision: Revision, number: int, checked: torch.dtype) -> None:
        self.revision, self.number, self.checked = revision, number, checked

    def error(self, name: str) -> float:
        """Against the definition of that revision."""
        return self.revision.ask("error", self.number, name)

    def growth(self, name: str, repeats: int, seconds: float) -> float:
        """MB at the peak, over the inputs."""
        return self.revision.ask("growth", self.number, name, repeats, seconds)

    def runs(self, name: str) -> Runs:
        """What is timed, by the clock of that process."""
        both, written = self.revision.ask("runs", self.number, name)

        forward, backward = (
            Elsewhere(partial(self.revision.ask, "time", self.number, name, way)) for way in (False, True)
        )
        return Runs(forward, backward if both else None, written)


# --- in the process of the revision ------------------------------------------------------------------------------


def serve() -> None:
    """Answer on the standard output what is asked on the standard input, until it is closed."""
    answers, service = sys.stdout.buffer, _Service()
    # Whatever else is printed must not get between; as in the harness, every shape is a graph of its own.
    with redirect_stdout(sys.stderr), torch._dynamo.config.patch(recompile_limit=256):
        while True:
            try:
                what, arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            _answer(service, what, arguments, answers)


def _answer(service: _Service, what: str, arguments: tuple[Any, ...], to: BinaryIO) -> None:
    try:
        answer = getattr(service, what)(*arguments), False
    except Exception as error:
        answer = NoRoom(reason(error)), True
    pickle.dump(answer, to)
    to.flush()


class _Service:
    def __init__(self) -> None:
        self.cases: list[Here] = []
        self.ready: dict[tuple[int, str], Runs] = {}

    def forget(self) -> None:
        self.cases, self.ready = [], {}

    def prepare(self, case: Case, device: str, dtype: torch.dtype) -> int:
        self.cases.append(Here(case, device, dtype))
        return len(self.cases) - 1

    def error(self, number: int, name: str) -> float:
        return self.cases[number].error(name)

    def growth(self, number: int, name: str, repeats: int, seconds: float) -> float:
        return self.cases[number].growth(name, repeats, seconds)

    def runs(self, number: int, name: str) -> tuple[bool, int]:
        found = self.ready[number, name] = self.cases[number].runs(name)
        return found.both is not None, found.written

    def time(self, number: int, name: str, both: bool) -> float:
        runs = self.ready[number, name]
        call = runs.both if both else runs.forward
        assert call is not None
        return (event_ms if self.cases[number].device == "cuda" else clock_ms)(call)
