"""Contact sheets: which samples they show, that they show them as they are, and what they refuse."""

import sys

import numpy as np
import pytest
from PIL import Image

from coverfast.checks import InputError
from coverfast.report.class_colours import class_colours, label_overlay
from coverfast.report.contact_sheet import contact_sheet, shorten
from coverfast.samples import SPLITS, Sample
from coverfast.shards import Shard, ShardWriter


def write(path, arrays, *, spacing=None, splits=("train",), hi=255.0):
    with ShardWriter(path, preprocessing={}) as writer:
        for i, array in enumerate(arrays):
            mm = spacing or (1.0,) * (array.ndim - 1)
            split = splits[i % len(splits)]
            writer.add(Sample(array, 1.0, 0.0, 0.0, hi, mm, f"{path.stem}-{i}", split=split))
    return path


def flat(value, shape=(1, 8, 8)):
    return np.full(shape, value, np.uint8)


@pytest.fixture
def read(monkeypatch):
    """The names of the samples that are read."""
    names = []

    def spy(self, index, *rest, original=Shard.read, **named):
        sample = original(self, index, *rest, **named)
        names.append(sample.source)
        return sample

    monkeypatch.setattr(Shard, "read", spy)
    return names


def shown(path):
    return np.asarray(Image.open(path).convert("L")).astype(int)


def panels(path, *greys):
    """Bounding box (left, top, right, bottom) of the pixels of these greys, of a picture without text in them."""
    found = np.isin(shown(path), greys)
    # Rows of text hold such greys, too, but few of them.
    rows, columns = (np.flatnonzero(found.sum(axis=axis) > 60) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_samples_are_spread_over_all_shards(tmp_path, read):
    shards = [write(tmp_path / "a.h5", [flat(9)] * 10), write(tmp_path / "b.h5", [flat(9)] * 30)]
    read.clear()
    assert contact_sheet(shards, tmp_path / "out.png", count=8) == 8
    assert read == ["a-0", "a-5", *(f"b-{i}" for i in range(0, 30, 5))]
    read.clear()
    assert contact_sheet(shards[0], tmp_path / "out.png") == 10
    assert read == [f"a-{i}" for i in range(10)]
    read.clear()
    assert contact_sheet(shards, tmp_path / "out.png", count=1) == 1
    assert read == ["a-0"]


def test_a_split_alone(tmp_path, read):
    shards = [write(tmp_path / "a.h5", [flat(9)] * 7, splits=SPLITS), write(tmp_path / "b.h5", [flat(9)] * 2)]
    read.clear()
    assert contact_sheet(shards, tmp_path / "out.png", split="val") == 2
    assert read == ["a-1", "a-4"]
    with pytest.raises(InputError, match=r"the split test must have at least 1 sample, got 0 in .*b.h5"):
        contact_sheet(shards[1], tmp_path / "none.png", split="test")
    with pytest.raises(InputError, match="split must be one of train, val, test, got 'dev'"):
        contact_sheet(shards, tmp_path / "none.png", split="dev")
    assert not (tmp_path / "none.png").exists()


def test_images_are_shown_upright_between_lo_and_hi(tmp_path):
    image = flat(0, (1, 20, 40))
    image[:, :10, 20:] = 80  # upper right
    path = write(tmp_path / "a.h5", [image], hi=160.0)
    contact_sheet(path, tmp_path / "out.png")
    picture, (left, top, right, bottom) = shown(tmp_path / "out.png"), panels(tmp_path / "out.png", 0, 128)
    wide, tall = right - left, bottom - top
    assert wide / tall == pytest.approx(2, abs=0.02)
    quarters = [picture[top + tall * y // 4, left + wide * x // 4] for y in (1, 3) for x in (1, 3)]
    assert quarters == [0, 128, 0, 0]


def test_volumes_are_three_slices_in_physical_shape(tmp_path):
    volume = flat(0, (1, 10, 40, 60))
    volume[:, 5:, 20:, 30:] = 128  # superior, anterior, right, middle planes included
    path = write(tmp_path / "a.h5", [volume], spacing=(2.0, 1.0, 1.0))
    contact_sheet(path, tmp_path / "out.png")
    picture, (left, top, right, bottom) = shown(tmp_path / "out.png"), panels(tmp_path / "out.png", 0, 128)
    # axial 60 x 40 mm, coronal 60 x 20 mm, sagittal 40 x 20 mm, side by side
    mm = (right - left) / 160
    assert (bottom - top) / mm == pytest.approx(40, abs=0.5)
    middle = (top + bottom) / 2
    for across, width, height in ((0, 60, 40), (60, 60, 20), (120, 40, 20)):
        quarters = [
            picture[int(middle + y * height * mm), int(left + (across + x * width) * mm)]
            for y in (-0.25, 0.25)
            for x in (0.25, 0.75)
        ]
        assert quarters == [0, 128, 0, 0], across
        if height == 20:
            assert picture[int(middle - 15 * mm), int(left + (across + width / 2) * mm)] == 255


def test_fine_images_are_averaged(tmp_path):
    stripes = flat(0, (1, 2100, 2050))
    stripes[:, ::2] = 200
    contact_sheet(write(tmp_path / "a.h5", [stripes]), tmp_path / "out.png")
    left, top, right, bottom = panels(tmp_path / "out.png", 99, 100)
    assert (right - left) / (bottom - top) == pytest.approx(2050 / 2100, rel=0.02)
    assert np.ptp(shown(tmp_path / "out.png")[top + 1 : bottom - 1, left + 1 : right - 1]) <= 2


@pytest.fixture
def texts(monkeypatch):
    """What is written on the sheet."""
    from matplotlib.axes import Axes

    found = []

    def spy(self, x, y, text, *rest, original=Axes.text, **named):
        found.append(text)
        return original(self, x, y, text, *rest, **named)

    monkeypatch.setattr(Axes, "text", spy)
    return found


def labelled(path, labels, **options):
    with ShardWriter(path, preprocessing={}, **options) as writer:
        for i, values in enumerate(labels):
            pixels = np.zeros((1, *values.shape), np.uint8)
            writer.add(Sample(pixels, 1, 0, 0, 255, (1.0,) * values.ndim, f"s{i}", labels=values, target=f"kind {i}"))
    return path


def test_labels_lie_over_their_image_with_a_legend_and_targets(tmp_path, texts):
    labels = np.zeros((20, 40), np.uint8)
    labels[:10, 20:] = 7  # upper right
    other = np.zeros((20, 40), np.uint8)
    other[5:15, 5:30] = 3
    path = labelled(tmp_path / "a.h5", [labels, other], label_classes={7: "liver", 3: "spleen", 9: "absent"})
    contact_sheet(path, tmp_path / "out.png", count=1)
    assert "7 liver" in texts
    assert not [text for text in texts if "spleen" in text or "absent" in text]  # of what is to be seen
    assert any(text.endswith("train, kind 0") for text in texts)
    picture = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    ink = np.rint(255 * class_colours(2)[1]).astype(int)
    tinted, strong = (np.abs(picture - colour).max(axis=-1) <= 3 for colour in (0.3 * ink, ink))
    black = picture.max(axis=-1) == 0
    rows, columns = (np.flatnonzero((tinted | black).sum(axis=axis) > 60) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    wide, tall = right - left, bottom - top
    quarters = [tinted[top + tall * y // 4, left + wide * x // 4] for y in (1, 3) for x in (1, 3)]
    assert quarters == [False, True, False, False]
    # Outlined where it meets the background: at its left and at its bottom; and a square in the legend.
    assert strong[top + tall // 4, left + wide // 2 : left + wide // 2 + wide // 40].all()
    assert not strong[top + tall // 4, right - wide // 10 : right - 3].any()
    assert strong[:top].sum() > 50
    texts.clear()
    contact_sheet(path, tmp_path / "out.png")
    assert "3 spleen" in texts
    assert "7 liver" in texts


def test_labels_of_volumes_and_of_fine_images_and_of_many_classes(tmp_path, texts):
    volume = np.zeros((4, 12, 12), np.uint8)
    volume[2] = np.arange(144).reshape(12, 12)
    contact_sheet(labelled(tmp_path / "v.h5", [volume]), tmp_path / "out.png")
    assert "50" in texts
    fine = np.zeros((2100, 2050), np.uint16)
    fine[500:1000, 500:1000] = 300
    contact_sheet(labelled(tmp_path / "f.h5", [fine]), tmp_path / "out.png")
    assert "300" in texts
    texts.clear()
    names = {value: f"a rather long name of class number {value}" for value in range(144)}
    contact_sheet(labelled(tmp_path / "n.h5", [volume], label_classes=names), tmp_path / "out.png")
    assert len([text for text in texts if "rather long" in text]) < 30
    (more,) = [text for text in texts if text.startswith("and ")]
    assert int(more.split()[1]) == 143 - len([text for text in texts if "rather long" in text])


def test_class_colours_and_outlines():
    colours = class_colours(12)
    np.testing.assert_array_equal(colours[:5], class_colours(5))
    assert not colours[0].any()
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1)
    assert apart[np.triu_indices(12, 1)].min() > 0.2
    labels = np.zeros((7, 7), np.uint8)
    labels[1:6, 1:6] = 1
    labels[3, 3] = 2
    alpha = label_overlay(labels, colours)[..., 3]
    rim = np.zeros((7, 7), bool)
    rim[1:6, 1:6] = True
    rim[2:5, 2:5] = False
    rim[3, 3] = True
    np.testing.assert_array_equal(alpha == 1, rim)
    np.testing.assert_array_equal(alpha == 0, labels == 0)
    np.testing.assert_array_equal(label_overlay(labels, colours)[3, 3, :3], colours[2])


def test_any_name_shape_and_number(tmp_path, recwarn):
    names = ["$x^{$", "a\nb\tc", "第三", "long/" * 200, ""]
    with ShardWriter(tmp_path / "odd.h5", preprocessing={}) as writer:
        for i in range(60):
            pixels = np.zeros((2, 1 + 40 * (i % 5 == 0), 1 + 7 * i), np.float32)
            writer.add(Sample(pixels, 1.0, 0.0, 0.0, 0.0, (0.1, 3.0), names[i % 5]))
    for count in (1, 2, 3, 7, 60):
        assert contact_sheet(tmp_path / "odd.h5", tmp_path / "out.png", count=count) == count
        width, height = Image.open(tmp_path / "out.png").size
        assert width == 1760
        assert height < 6000
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_shorten_keeps_both_ends():
    assert shorten("abc", 10) == "abc"
    assert shorten("0123456789", 7) == "012…789"
    assert shorten("0123456789", 0) == "01…89"
    assert shorten("a\nb", 9) == "a?b"


def test_refusals_leave_what_was_there(tmp_path):
    path, out = write(tmp_path / "a.h5", [flat(9)]), tmp_path / "out.png"
    out.write_bytes(b"old")
    with pytest.raises(InputError, match="paths must be at least 1 shard, got none"):
        contact_sheet([], out)
    for count in (0, 2.5):
        with pytest.raises(InputError, match=f"count must be an int of at least 1, got {count}"):
            contact_sheet(path, out, count=count)
    with pytest.raises(InputError, match=r"none\.h5"):
        contact_sheet([path, tmp_path / "none.h5"], out)
    with pytest.raises(InputError, match=r"out\.png cannot be written"):
        contact_sheet(path, tmp_path / "nowhere" / "out.png")
    damaged = bytearray(path.read_bytes())
    spot = damaged.find(bytes([9]) * 64)
    assert spot > 0
    damaged[spot + 5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"a\.h5"):
        contact_sheet(path, out)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "out.png"]


def test_without_matplotlib(tmp_path, monkeypatch):
    path = write(tmp_path / "a.h5", [flat(9)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"drawing needs the extra: pip install coverfast\[plots\]"):
        contact_sheet(path, tmp_path / "out.png")
