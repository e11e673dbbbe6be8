"""`coverfast visualize`: any image as training would see it, a folder each, refusals of one line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from coverfast import Cover, InputError, UNet, VectorPyramid
from coverfast.cli.images import result_names
from coverfast.cli.main import app
from coverfast.cli.visualize import visualize
from coverfast.ingest import Source, preprocess, preprocessing, read_source
from coverfast.loader import to_unit_range
from coverfast.phantom import phantom


def network(ndim=2, channels=1, **options):
    torch.manual_seed(1)
    unet = UNet(ndim, channels, (8, 8, 8))
    pyramid = VectorPyramid(ndim, unet.feature_channels, (1, 1), 4, 3)
    return Cover(unet, pyramid, **{"crop": (32, 48, 16)[:ndim], **options}).eval()


@pytest.fixture
def restored(monkeypatch, tmp_path):
    """Put a method in the place of the checkpoint, and pictures of few pixels; gives a function that does."""
    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)

    def put(method=None, settings=None, metrics=None, notes=()):
        found = SimpleNamespace(
            method=method or network(),
            preprocessing=preprocessing("raw") if settings is None else settings,
            iteration=12,
            metrics=metrics,
            notes=list(notes),
        )
        monkeypatch.setattr("coverfast.training.restore.restore_method", lambda path, device, **options: found)
        return found

    return put


def png(path, size=(60, 70), index=0):
    pixels = (255 * phantom(2, size, seed=0, index=index).image).round().astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def refused(capsys, *images, **options):
    """The sentences of a call that ends with exit code 2."""
    with pytest.raises(typer.Exit) as caught:
        visualize("checkpoint", list(images), **options)
    assert caught.value.exit_code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines


def spied(monkeypatch, found):
    """The batches whose pictures are made; nothing is drawn."""
    seen, real = [], found.method.pictures
    monkeypatch.setattr(found.method, "pictures", lambda batch: seen.append(batch) or real(batch))
    monkeypatch.setattr("coverfast.report.write_report", lambda folder, *args, **kwargs: folder)
    return seen


def test_one_image_has_a_folder_and_no_index(restored, tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"iteration": 1, "loss": 2.5}\n{"iteration": 2, "loss": 1.5}\n')
    restored(metrics=metrics, notes=["iteration-9.pt is damaged"])
    visualize("run", [png(tmp_path / "a scan.png")], out=tmp_path / "out")
    said = capsys.readouterr()
    page = tmp_path / "out" / "a-scan" / "index.html"
    assert said.out.splitlines()[0] == "iteration-9.pt is damaged"
    assert said.out.splitlines()[1].startswith(f"{page}: error ")
    assert said.err == ""
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a-scan"]
    names = ["curves.png", "features.png", "index.html", "overview.png", "similarity.png"]
    assert sorted(p.name for p in page.parent.iterdir()) == names
    text = page.read_text()
    for fact in (str(tmp_path / "a scan.png"), "60x70", "preset raw", "run, iteration 12", "32x48, seed 0", "1.5"):
        assert fact in text


def test_several_images_have_an_index_and_bad_ones_are_told_at_the_end(restored, tmp_path, capsys):
    restored()
    (tmp_path / "b.png").write_bytes(b"nothing")
    good = [png(tmp_path / "a.png"), png(tmp_path / "c.png", index=1)]
    lines = refused(capsys, good[0], tmp_path / "b.png", good[1], out=tmp_path / "out")
    assert len(lines) == 1
    assert f"{tmp_path / 'b.png'} cannot be read as PNG" in lines[0]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "c", "index.html"]
    index = (tmp_path / "out" / "index.html").read_text()
    assert 'href="a/index.html"' in index
    assert 'href="c/index.html"' in index


@pytest.mark.parametrize(
    ("settings", "name", "pixels"),
    [
        (preprocessing("raw"), "a.png", None),
        (preprocessing("chest-xray", size=64, fit="pad"), "a.png", None),
        (preprocessing("raw"), "a.npy", np.linspace(-5, 9, 50 * 60, dtype=np.float32).reshape(50, 60)),
    ],
)
def test_the_network_sees_what_it_would_see_from_a_shard(restored, monkeypatch, tmp_path, settings, name, pixels):
    found = restored(settings=settings)
    seen = spied(monkeypatch, found)
    path = tmp_path / name
    if pixels is None:
        png(path)
    else:
        np.save(path, pixels)
    visualize("run", [path], out=tmp_path / "out", seed=5)
    sample = preprocess(read_source(Source(path, name)), settings)
    scaling = np.array([[sample.slope, sample.intercept, sample.lo, sample.hi]])
    (batch,) = seen
    assert torch.equal(batch.images, to_unit_range(torch.tensor(sample.pixels)[None], scaling))
    assert float(batch.images.max()) > 0.9
    assert batch.sizes.tolist() == [list(sample.pixels.shape[1:])]
    assert (batch.corner.tolist(), batch.samples.tolist(), batch.seed, batch.iteration) == ([[0, 0]], [0], 5, 0)


def test_images_of_a_network_without_preset_are_taken_as_they_are(restored, monkeypatch, tmp_path, capsys):
    found = restored(settings={"preset": "phantom", "seed": 3})
    seen = spied(monkeypatch, found)
    visualize("run", [png(tmp_path / "a.png")], out=tmp_path / "out")
    assert seen[0].images.shape == (1, 1, 60, 70)
    assert "note: the network learned from images that no preset made ('phantom')" in capsys.readouterr().out


def test_a_volume_by_its_own_preset(restored, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    volume = (1000 * phantom(3, (40, 44, 36), seed=0).image).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume.T, np.eye(4)), tmp_path / "head.nii.gz")
    restored(network(3), preprocessing("brain-mr", shape=(40, 48, 32)))
    visualize("run", [tmp_path / "head.nii.gz"], out=tmp_path / "out")
    text = (tmp_path / "out" / "head" / "index.html").read_text()
    assert "40x48x32" in text
    assert "32x48x16" in text
    assert "curves.png" not in text


def test_images_smaller_than_the_views(restored, tmp_path, capsys):
    path = png(tmp_path / "small.png", (30, 40))
    restored()
    (line,) = refused(capsys, path, out=tmp_path / "out")
    assert "must be at least 32x48 pixels, the size of the views, got 30x40" in line
    assert "--pad" in line
    assert not (tmp_path / "out").exists()
    restored(network(pad=True))
    visualize("run", [path], out=tmp_path / "out")
    assert (tmp_path / "out" / "small" / "similarity.png").exists()


def test_views_without_a_common_pixel_are_told(restored, tmp_path, capsys):
    restored(network(crop=8))
    visualize("run", [png(tmp_path / "a.png", (200, 200))], out=tmp_path / "out", seed=3)
    assert capsys.readouterr().out.endswith(
        "no pixel in both views; the views are small for the image, another --seed draws others\n"
    )
    text = (tmp_path / "out" / "a" / "index.html").read_text()
    assert "no pixel in common" in text
    assert "similarity.png" not in text


def test_images_that_are_not_of_the_network(restored, tmp_path, capsys):
    path = png(tmp_path / "a.png")
    restored(network(3), preprocessing("ct"))
    (line,) = refused(capsys, path)
    assert line.endswith("a.png must be 3D like the images the network learned from, got 2D")
    restored(network(channels=2))
    (line,) = refused(capsys, path)
    assert line.endswith("a.png must have 2 channel(s) like the images the network learned from, got 1")


def test_without_matplotlib_nothing_is_started(restored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install coverfast\[plots\]"):
        visualize("run", [png(tmp_path / "a.png")], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_image_has_a_folder_of_its_own(tmp_path):
    paths = ["x/scan.nii.gz", "y/SCAN.nii", "z/scan.png", "x/scan-2.png", "odd name (1).mha", "...", "ct/IM1"]
    sources = [Source(tmp_path / p, p) for p in paths]
    slices = tuple((str(tmp_path / f"ct/IM{i}"), 0) for i in (1, 2))
    sources[-1] = Source(tmp_path / "ct/IM1", "dicom/1", parts=slices)
    names = result_names(sources)
    assert names == ["scan", "SCAN-2", "scan-3", "scan-2-2", "odd-name-1", "image", "ct"]
    assert len({name.lower() for name in names}) == len(paths)


def test_a_run_as_training_leaves_it(tmp_path, monkeypatch):
    from coverfast.training.checkpoints import Checkpoints
    from coverfast.training.config import as_plain
    from coverfast.training.settings import resolve

    monkeypatch.setattr("coverfast.report.sheet.DPI", 15)
    monkeypatch.chdir(tmp_path)
    small = {"crop": (32,), "channels": (8, 8, 8), "groups": (1, 1), "head_dim": 4, "window": (3,)}
    settings = as_plain(resolve("small-2d", small))
    about = {"ndim": 2, "channels": 1, "preprocessing": preprocessing("raw")}
    state = {"method": network(crop=32).state_dict(), "settings": settings, "data": about}
    (tmp_path / "run").mkdir()
    Checkpoints(tmp_path / "run" / "checkpoints").save(7, state, keep=1)
    image = png(tmp_path / "a.png")
    done = CliRunner().invoke(app, ["visualize", "run", str(image), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    (page,) = Path().glob("runs/*-visualize/a/index.html")
    loaded, drawn = done.output.splitlines()[:2]
    assert loaded.endswith("32 matched, 0 missing, 0 unexpected, 0 reshaped")
    assert drawn.startswith(f"{page}: error")
    assert "iteration 7" in page.read_text()
    refusal = CliRunner().invoke(app, ["visualize", "none.pt", str(image)]).exception
    assert isinstance(refusal, InputError)
    assert "none.pt" in str(refusal)
