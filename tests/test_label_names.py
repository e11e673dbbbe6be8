"""Which label map and which class belongs to which image: names, and tables in CSV files."""

from __future__ import annotations

import pytest

from coverfast.checks import InputError
from coverfast.ingest.files import scan
from coverfast.ingest.labels import find_maps, read_class_table, read_label_table

# ---- which map belongs to which image


def matched(tmp_path, images, labels):
    """(image, map) by `find_maps`, of files of these names, which are empty."""
    for folder, names in (("i", images), ("l", labels)):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    found, maps = find_maps(scan(tmp_path / "i").sources, tmp_path / "l")
    return {(a.below, b.below) for a, b in zip(found, maps, strict=True)}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("a.png", "a.png"),
        ("a.nii.gz", "a.nii"),
        ("x/a.b.png", "x/a.b.tif"),
        ("case_0000.nii.gz", "case.nii.gz"),
        ("case_0003.nii.gz", "case_gt.nii.gz"),
        *(("a.jpg", f"a{ending}.png") for ending in ("_seg", "-seg", "_label", "-labels", "_mask", ".SEG", "_gt")),
        ("a_mask.png", "a_mask.png"),
        ("2019_0001.png", "2019_0001_mask.png"),
    ],
)
def test_names_that_belong_together(tmp_path, image, label):
    assert matched(tmp_path, [image], [label, *()]) == {(image, label)}
    # Beside others, too: not only as the one and only.
    others = {f"z/{n}.png" for n in range(2)}
    both = matched(tmp_path, [image, *others], [label, *others])
    assert both == {(image, label)} | {(o, o) for o in others}


def test_a_name_of_its_own_goes_before_a_shortened_one(tmp_path):
    assert matched(tmp_path, ["a.png", "a_0001.png"], ["a.png", "a_0001.png"]) == {
        ("a.png", "a.png"),
        ("a_0001.png", "a_0001.png"),
    }


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (["a.png", "b.png"], ["a.png"], r"found no map for 1 of 2 images \(i/b.png\)$"),
        (["a.png"], ["a.png", "b.png", "c.png"], r"found no image for 2 of 3 maps \(l/b.png, l/c.png\)$"),
        (["a.png", "b.png"], ["c.png", "d.png"], r"no map for 2 of 2 images \(.*\) and no image for 2 of 2 maps"),
        (["x/a.png", "b.png"], ["y/a.png", "b.png"], r"no map for 1 of 2 images \(i/x/a.png\) and no image"),
        (
            ["a.png", "b.png"],
            ["a_seg.png", "a_mask.png"],
            r"i/a.png must have 1 label map, got l/a_mask.png, l/a_seg.png",
        ),
        (
            ["a_0000.png", "a_0001.png"],
            ["a.png"],
            r"l/a.png must be the label map of 1 image, got i/a_0000.png, i/a_0001",
        ),
        ([f"{n}.png" for n in range(5)], ["0.png"], r"for 4 of 5 images \(i/1.png, i/2.png, i/3.png, ...\)"),
    ],
)
def test_names_that_do_not(tmp_path, images, labels, said):
    with pytest.raises(InputError, match=said):
        matched(tmp_path, images, labels)


# ---- tables


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"t.csv must have rows of value,name, got none"),
        ("1,liver\nliver,2\n", r"t.csv line 2 must have an integer of at least 0 first, got 'liver'"),
        ("-1,liver\n", r"line 1 must have an integer of at least 0 first, got '-1'"),
        ("1,liver\n1,spleen\n", r"line 2 must have a value that is new, got 1 again"),
        ("1,liver\n2,liver\n", r"t.csv: .*'liver' twice"),
        ("1;liver\n", r"line 1 must be value,name, got 1;liver"),
        ("1,\n", r"line 1 must be value,name, got 1,"),
        (f"{2**32},liver\n", r"t.csv: label values must be integers in \[0, 2\^32\)"),
        (b"1,caf\xe9\n", r"t.csv must be a CSV file in UTF-8"),
    ],
)
def test_label_tables_that_are_none(tmp_path, text, said):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        read_label_table(path)


def test_label_tables(tmp_path):
    (tmp_path / "t.csv").write_text('Value,Name\r\n\r\n5,"kidney, left"\r\n0,air\r\n')
    assert read_label_table(tmp_path / "t.csv") == ((0, "air"), (5, "kidney, left"))
    (tmp_path / "t.csv").write_text("5,kidney\n")
    assert read_label_table(tmp_path / "t.csv") == ((0, "background"), (5, "kidney"))
    with pytest.raises(InputError, match=r"nowhere.csv cannot be read"):
        read_label_table(tmp_path / "nowhere.csv")
    (tmp_path / "c.csv").write_text("a,yes\nb,no\na,no\n")
    with pytest.raises(InputError, match=r"c.csv line 3 must have the class of a that it has above, yes, got no"):
        read_class_table(tmp_path / "c.csv")
