"""The package as users get it: a wheel outside the clone, cheap imports, clean types and style."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tracked and untracked files of this checkout, built from a copy."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_the_library_and_nothing_at_the_top_level(unpacked: Path) -> None:
    assert sorted(p.name for p in unpacked.iterdir() if not p.name.endswith(".dist-info")) == ["coverfast"]
    for name in ("py.typed", "cli/main.py", "bench/harness.py", "ops/mov.py", "reference.py"):
        assert (unpacked / "coverfast" / name).is_file(), name
    every = {p.relative_to(ROOT / "coverfast") for p in (ROOT / "coverfast").rglob("*.py")}
    every |= {p.relative_to(ROOT) for p in (ROOT / "kernels").rglob("*.py")}
    assert every <= {p.relative_to(unpacked / "coverfast") for p in (unpacked / "coverfast").rglob("*.py")}


def test_installed_wheel_works_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    """In an environment that sees this one's dependencies, but not its editable install."""
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    outer = [p for p in sys.path if p.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(f"import sys; sys.path.append({p!r})" for p in outer))
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    code = "import coverfast.cli, coverfast.kernels, coverfast.bench; print(coverfast.cli.__file__, coverfast.UNet)"
    assert str(site) in run(python, "-c", code, cwd=tmp_path)
    assert "small-2d" in run(python, "-m", "coverfast", "config", "small-2d", cwd=tmp_path)
    arguments = ["demo", "--images", "2", "--iterations", "1"]
    assert "backbone.safetensors" in run(site / "bin" / "coverfast", *arguments, cwd=tmp_path, PYTHONPATH=str(site))


def test_types_are_clean(unpacked: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "coverfast"]
    assert "no issues" in run(*command, cwd=tmp_path, MYPYPATH=str(unpacked))


def test_style_is_clean() -> None:
    run(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)
    run(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)


def test_import_and_help_load_no_torch(tmp_path: Path) -> None:
    code = "import sys, coverfast.cli; assert not {'torch', 'triton', 'h5py', 'matplotlib'} & set(sys.modules)"
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_every_public_name_is_there() -> None:
    import coverfast

    assert all(getattr(coverfast, name) is not None for name in coverfast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coverfast.nothing


def test_everything_but_triton_works_without_triton(tmp_path: Path) -> None:
    """As on Windows and macOS: an environment in which `triton` cannot be found."""
    code = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.startswith("triton") else find_spec(name, package)
sys.meta_path.insert(0, Absent())
import torch, coverfast
k = torch.rand(1, 4, 5, 6)
q = torch.rand(1, 4, 5, 6, requires_grad=True)
coverfast.mov(q, k, window=3).sum().backward()
coverfast.warp(k, torch.zeros(1, 2, 5, 6))
try:
    coverfast.mov(q, k, window=3, impl="triton")
except coverfast.InputError as error:
    print(error)
"""
    assert "the package triton is not installed" in run(sys.executable, "-c", code, cwd=tmp_path)


def test_readme_commands_are_the_ones_ci_and_users_run() -> None:
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -c constraints.txt -e ".[all]" && coverfast demo\n' in readme
    tests = 'pip install -c constraints.txt -e ".[all]" && pytest\n'
    assert tests in readme
    assert tests in (ROOT / ".ci" / "run").read_text()
