"""Label maps and classes in shards: what goes in comes out, as values and as indices; what does not fit is refused."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
from dataclasses import replace

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coverfast.checks import InputError
from coverfast.class_tables import ClassIndices, ClassTables, values_of
from coverfast.samples import LABEL_DTYPES, LabelClass
from coverfast.shards import Original, Sample, Shard, ShardWriter, verify

SPARSE = (0, 2, 4, 1000)


def labelled(source="a.png", shape=(20, 30), values=SPARSE, seed=0, **changes):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (1, *shape)).astype(np.uint8)
    labels = None if values is None else rng.choice(np.array(values), shape).astype(np.uint16)
    said = {"labels": labels} | changes
    return Sample(pixels, 1.0, 0.0, 0.0, 255.0, (1.0,) * len(shape), source, **said)


def write(path, samples, **options):
    with ShardWriter(path, **({"preprocessing": {}} | options)) as writer:
        for sample in samples:
            writer.add(sample)
    return path


shapes = st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple)


@given(st.data(), shapes, st.sampled_from(LABEL_DTYPES), st.sampled_from("<>"))
def test_round_trip(tmp_path_factory, data, shape, dtype, order):
    known = data.draw(st.sets(st.integers(0, np.iinfo(dtype).max), min_size=1, max_size=256))
    labels = data.draw(hnp.arrays(np.dtype(dtype), shape, elements=st.sampled_from(sorted(known))))
    target = data.draw(st.sampled_from(["", "ill", "wohl ä"]))
    # Neither byte order nor strides reach the file.
    odd = np.repeat(labels, 2, axis=-1).astype(labels.dtype.newbyteorder(order))[..., ::2]
    options = {"label_classes": {v: f"name {v}" for v in known}} if data.draw(st.booleans()) else {}
    sample = labelled(shape=shape, labels=odd, target=target)
    path = write(tmp_path_factory.mktemp("trip") / "x.h5", [sample, sample], **options)
    ends = [sorted(data.draw(st.sets(st.integers(0, s), min_size=2, max_size=2))) for s in shape]
    region = [slice(a, b) for a, b in ends]
    with Shard(path) as shard:
        values = np.array([c.value for c in shard.label_classes])
        assert values.tolist() == sorted({0, *(known if options else labels.flat)})
        names = [c.name for c in shard.label_classes]
        assert names == [f"name {v}" if options and v in known else str(v) if v else "background" for v in values]
        back, part = shard.read(1), shard.read(1, region)
        indices = shard.labels(1, [None, region])
        assert (shard.info(1).target, back.target, part.target) == (target,) * 3
        assert shard.targets.tolist() == ([0, 0] if target else [-1, -1])
        assert shard.target_classes == ((target,) if target else ())
    assert back.labels.dtype == np.dtype(dtype)
    for found, index, where in ((back, indices[0], [slice(None)] * len(shape)), (part, indices[1], region)):
        np.testing.assert_array_equal(found.labels, labels[*where])
        assert index.dtype == np.uint8
        np.testing.assert_array_equal(values[index], labels[*where])
    assert verify(path) == []


def test_indices_of_a_sparse_table():
    classes = [LabelClass(v, str(v)) for v in SPARSE]
    for dtype in LABEL_DTYPES:
        small = [v for v in SPARSE if v <= np.iinfo(dtype).max]
        found = ClassIndices(classes)(np.array([small, small[::-1]], dtype))
        assert found.tolist() == [list(range(len(small))), list(range(len(small)))[::-1]]
        with pytest.raises(InputError, match=re.escape("must be of the shard's table (0, 2, 4, 1000), got 3, 5")):
            ClassIndices(classes)(np.array([0, 5, 3, 2], dtype))
    assert ClassIndices([LabelClass(0, "b")])(np.zeros(3, np.uint32)).tolist() == [0, 0, 0]
    numbered = ClassIndices([LabelClass(v, str(v)) for v in range(5)])
    for dtype in LABEL_DTYPES:
        found = numbered(np.array([3, 4, 0], dtype))
        assert (found.dtype, found.tolist()) == (np.uint8, [3, 4, 0])
        with pytest.raises(InputError, match=r"table \(0, 1, 2, 3, 4\), got 5, 255"):
            numbered(np.array([5, 4, 255, 5], dtype))
    full = [LabelClass(v * 3, str(v)) for v in range(256)]
    np.testing.assert_array_equal(ClassIndices(full)(np.arange(0, 768, 3, dtype=np.uint16)), np.arange(256))


def test_a_shard_without_labels_stays_version_2(tmp_path):
    sample = replace(labelled("ä.png", values=None), group="g", split="test")
    path = write(tmp_path / "x.h5", [sample])
    with h5py.File(path) as file:
        assert (file.attrs["version"], sorted(file)) == (2, ["samples", "scaling", "sizes", "splits"])
    one = hashlib.sha256(b"u1 1x20x30\n" + sample.pixels.tobytes()).digest()
    parts = [one, "ä.png".encode(), b"g", b"test", b"", struct.pack("<4d", 1, 0, 0, 255), struct.pack("<2d", 1, 1)]
    with Shard(path) as shard:
        assert (shard.version, shard.label_classes, shard.target_classes, shard.targets.tolist()) == (2, (), (), [-1])
        assert shard.content_hash == _content(parts)
        assert (shard.read(0).labels, shard.read(0).target) == (None, "")
        with pytest.raises(InputError, match=r"x\.h5 must have label maps to read labels, got a shard without"):
            shard.labels(0)


def _content(parts):
    return hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).hexdigest()


def test_hash_definition_of_the_format_page(tmp_path):
    original = Original((20, 30), np.eye(3))
    samples = [
        labelled("a", original=original, target="ä"),
        labelled("b", seed=1, values=(0, 7), target=""),
    ]
    classes, targets = {0: "none", 2: "lung", 4: "rib", 7: "ö", 1000: "skin"}, ("z", "ä")
    path = write(tmp_path / "x.h5", samples, label_classes=classes, target_classes=targets)
    parts, more = [], [b"version 3"]
    for s in samples:
        parts += [hashlib.sha256(b"u1 1x20x30\n" + s.pixels.tobytes()).digest(), s.source.encode(), b"", b"train", b""]
        parts += [struct.pack("<4d", 1, 0, 0, 255), struct.pack("<2d", 1, 1)]
        if s.original:
            parts += [np.eye(3).tobytes(), struct.pack("<2d", 20, 30), b""]
        more += [hashlib.sha256(b"u2 20x30\n" + s.labels.tobytes()).digest(), s.target.encode()]
    more += [struct.pack("<5Q", *classes), *(name.encode() for name in classes.values()), b"z", "ä".encode()]
    with Shard(path) as shard:
        assert shard.content_hash == _content(parts + more)
        assert (shard.version, shard.target_classes, shard.targets.tolist()) == (3, targets, [1, -1])
        assert not shard.targets.flags.writeable


def test_everything_labels_say_is_in_the_content_hash(tmp_path):
    table = {"label_classes": {2: "a", 4: "b", 1000: "c"}, "target_classes": ["x", "y"]}
    moved = labelled().labels.copy()
    moved[3, 4] = 2 if moved[3, 4] != 2 else 4
    ways = [
        ([labelled(target="x")], table),
        ([labelled(target="y")], table),
        ([labelled(target="")], table),
        ([labelled(target="x", labels=moved)], table),
        ([labelled(target="x", labels=labelled().labels.astype(np.uint32))], table),
        ([labelled(target="x")], table | {"label_classes": {2: "a", 4: "b", 1000: "d"}}),
        ([labelled(target="x")], table | {"label_classes": {2: "a", 4: "b", 5: "z", 1000: "c"}}),
        ([labelled(target="x")], table | {"target_classes": ["y", "x"]}),
        ([labelled(target="x", values=None)], {"target_classes": ["x", "y"]}),
        ([labelled(values=None)], {}),
    ]
    paths = [write(tmp_path / f"{i}.h5", samples, **options) for i, (samples, options) in enumerate(ways)]
    assert len({Shard(path).content_hash for path in paths}) == len(ways)
    again = write(tmp_path / "again.h5", *ways[0][:1], **ways[0][1])
    assert again.read_bytes() == paths[0].read_bytes()


def test_label_maps_are_checksummed_and_small(tmp_path):
    blocks = np.kron(np.arange(12).reshape(3, 4), np.ones((100, 100), int)).astype(np.uint32)
    path = write(tmp_path / "x.h5", [labelled(shape=(300, 400), labels=blocks, target="t")] * 12)
    with h5py.File(path) as file:
        for dataset in file["labels"].values():
            plist = dataset.id.get_create_plist()
            filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
            assert filters == [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32]
            assert dataset.chunks == file["samples/00000000"].chunks[1:]
            assert dataset.id.get_storage_size() < blocks.nbytes // 50
        assert file["targets"].fletcher32
        for node in (file, file["labels"], file["targets"], *file["labels"].values()):
            assert len(node.attrs) <= 8
            kinds = [h5py.h5a.open(node.id, name.encode()).get_type() for name in node.attrs]
            assert not any(isinstance(k, h5py.h5t.TypeStringID) and k.is_variable_str() for k in kinds)


def test_reserved_space_is_never_exceeded(tmp_path):
    names = {v: f"{v} {'n' * 85}" for v in range(1, 256)}
    with ShardWriter(tmp_path / "x.h5", preprocessing={"long": "x" * 30000}, label_classes=names) as writer:
        for i in range(4):
            noise = np.random.default_rng(i).integers(0, 256, (1300, 1000)).astype(np.uint8)
            writer.add(labelled("n" * 30000, noise.shape, labels=noise, target="t" * i))
            assert writer._file.id.get_filesize() <= writer._reserved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": None}, "odd.png must have a label map like a.png, got none"),
        ({"labels": np.zeros((20, 31), np.uint8)}, "labels must be on the image's grid, (20, 30), got shape (20, 31)"),
        ({"labels": np.zeros((1, 20, 30), np.uint8)}, "must be on the image's grid, (20, 30), got shape (1, 20, 30)"),
        ({"labels": np.zeros((20, 30), np.int16)}, "labels must be one of uint8, uint16, uint32, got int16"),
        ({"labels": np.zeros((20, 30), bool)}, "got bool"),
        ({"labels": [[1]]}, "labels must be a numpy array, got list"),
        (
            {"labels": np.arange(600, dtype=np.uint16).reshape(20, 30)},
            "odd.png: label map must have at most 256 values, got at least 600, is it an image?",
        ),
        (
            {"labels": (np.arange(600) % 256 + 5).astype(np.uint32).reshape(20, 30)},
            "odd.png: a shard must have at most 256 label classes, got 260",
        ),
        ({"target": "a\0b"}, "target must be a string without NUL"),
        ({"target": 3}, "target must be a string without NUL, got 3"),
        ({"target": "x" * 32767}, "odd.png: the names of the target classes must be at most 32768 bytes together"),
    ],
)
def test_bad_labels_are_refused_and_the_rest_goes_on(tmp_path, changes, words):
    with ShardWriter(tmp_path / "x.h5", preprocessing={}) as writer:
        writer.add(labelled(target="x"))
        with pytest.raises(InputError, match=re.escape(words)):
            writer.add(labelled("odd.png", **changes))
        writer.add(labelled("b.png", values=(0, 9), target="b"))
    with Shard(tmp_path / "x.h5") as shard:
        assert [c.value for c in shard.label_classes] == [0, 2, 4, 9, 1000]
        assert (shard.target_classes, shard.targets.tolist()) == (("b", "x"), [1, 0])


def test_the_first_image_without_labels_decides_too(tmp_path):
    with ShardWriter(tmp_path / "x.h5", preprocessing={}) as writer:
        writer.add(labelled(values=None))
        with pytest.raises(InputError, match=r"odd.png must have no label map like a.png, got one"):
            writer.add(labelled("odd.png"))
        writer.add(labelled("late.png", values=None, target="x"))
    with Shard(tmp_path / "x.h5") as shard:
        assert (shard.version, shard.label_classes, shard.targets.tolist()) == (3, (), [-1, 0])


def test_what_is_not_in_a_given_table_is_refused(tmp_path):
    given = {"label_classes": [LabelClass(2, "lung"), LabelClass(4, "rib")], "target_classes": ("ill", "fit")}
    with ShardWriter(tmp_path / "x.h5", preprocessing={}, **given) as writer:
        with pytest.raises(
            InputError, match=re.escape("a.png: label values must be of the given label_classes (0, 2, 4), got 3, 7")
        ):
            writer.add(labelled(values=(0, 2, 3, 7)))
        with pytest.raises(
            InputError, match=re.escape("a.png: target must be of the given target_classes (ill, fit), got sick")
        ):
            writer.add(labelled(values=(0, 2), target="sick"))
        with pytest.raises(InputError, match=r"a.png must have a label map where label_classes are given, got none"):
            writer.add(labelled(values=None))
        writer.add(labelled(values=(0, 4), target="fit"))
    with Shard(tmp_path / "x.h5") as shard:
        assert shard.label_classes == ((0, "background"), (2, "lung"), (4, "rib"))
        assert set(shard.labels(0)[0].flat) == {0, 2}
        assert (shard.target_classes, shard.targets.tolist()) == (("ill", "fit"), [1])
    # Classes that no image of the shard has are kept as well: another part of the data set may.
    path = write(tmp_path / "y.h5", [labelled(values=None)], target_classes=["ill", "fit"])
    assert Shard(path).target_classes == ("ill", "fit")
    assert verify(path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_classes": {-1: "x"}}, "label values must be integers in [0, 2^32), rising from 0, got -1, 0"),
        ({"label_classes": {2**32: "x"}}, "label values must be integers in [0, 2^32)"),
        ({"label_classes": {1.5: "x"}}, "must be pairs of an integer value and a name"),
        ({"label_classes": ["lung"]}, "must be pairs of an integer value and a name"),
        ({"label_classes": [(1, "x"), (1, "y")]}, "must name a value once"),
        ({"label_classes": {1: ""}}, "the name of a label class must be a string, not empty and without NUL, got ''"),
        ({"label_classes": {1: 3}}, "the name of a label class must be a string"),
        ({"label_classes": {1: "a", 2: "a"}}, "label classes must have different names, got 'a' twice"),
        ({"label_classes": {1: "background"}}, "must have different names, got 'background' twice"),
        ({"label_classes": {i: str(i) for i in range(257)}}, "at most 256 label classes, got 257"),
        ({"label_classes": {i: "n" * 200 + str(i) for i in range(200)}}, "must be at most 32768 bytes together, got"),
        ({"target_classes": "ill"}, "target_classes must be a sequence of names, got 'ill'"),
        ({"target_classes": ["a", "a"]}, "target classes must have different names, got 'a' twice"),
        ({"target_classes": [[1]]}, "the name of a target class must be a string"),
        ({"target_classes": [str(i) for i in range(257)]}, "at most 256 target classes, got 257"),
    ],
)
def test_tables_that_are_none(tmp_path, options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        ShardWriter(tmp_path / "x.h5", preprocessing={}, **options)


@settings(max_examples=50)
@given(hnp.arrays(np.uint32, st.integers(1, 400), elements=st.integers(0, 300) | st.sampled_from([2**32 - 1])))
def test_values_of_a_label_map(labels):
    import coverfast.class_tables as tables

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_SLAB", 37)
        expected = sorted({int(v) for v in labels})
        if len(expected) > 256:
            with pytest.raises(InputError, match=r"x: label map must have at most 256 values"):
                values_of(labels, "x")
        else:
            assert values_of(labels, "x") == expected


def test_copies_bring_labels_and_tables(tmp_path):
    named = write(
        tmp_path / "a.h5",
        [labelled("a", target="x"), labelled("b", seed=1, values=(0, 2))],
        label_classes={2: "lung", 4: "rib", 1000: "skin"},
        target_classes=["y", "x"],
    )
    with Shard(named) as shard:
        with ShardWriter(tmp_path / "b.h5", preprocessing={}) as writer:
            writer.copy(shard, 0)
            writer.copy(shard, 1)
            stored = [h["labels/00000000"].id.get_storage_size() for h in (shard._file, writer._file)]
        assert stored[0] == stored[1]
        assert Shard(tmp_path / "b.h5").content_hash == shard.content_hash
        # A table of the writer's own has the last word on names, and on values if they do occur.
        with ShardWriter(tmp_path / "c.h5", preprocessing={}, label_classes={2: "other"}) as writer:
            with pytest.raises(InputError, match=r"a: label values must be of the given .*\(0, 2\), got 4, 1000"):
                writer.copy(shard, 0)
            writer.copy(shard, 1)
            writer.add(labelled("c", values=(2,)))
        with ShardWriter(tmp_path / "d.h5", preprocessing={}) as writer:
            writer.add(labelled("c", values=(2, 9)))
            writer.copy(shard, 0)
            with pytest.raises(InputError, match=r"u: label value 2 must be 'lung' as in a, got '2'"):
                writer.copy(Shard(write(tmp_path / "u.h5", [labelled("u")])), 0)
            with pytest.raises(InputError, match=r"v must have a label map like c, got none"):
                writer.copy(Shard(write(tmp_path / "v.h5", [labelled("v", values=None)])), 0)
    with Shard(tmp_path / "c.h5") as shard:
        assert shard.label_classes == ((0, "background"), (2, "other"))
        np.testing.assert_array_equal(shard.read(0).labels, labelled(seed=1, values=(0, 2)).labels)
    with Shard(tmp_path / "d.h5") as shard:
        assert shard.label_classes == ((0, "background"), (2, "lung"), (4, "rib"), (9, "9"), (1000, "skin"))
        assert (shard.target_classes, shard.targets.tolist()) == (("y", "x"), [-1, 1])


def test_a_foreign_layout_is_read_and_copied(tmp_path):
    path = write(tmp_path / "x.h5", [labelled(target="x")])
    with h5py.File(path, "r+") as file:
        old = file["labels/00000000"]
        values, sha256 = old[()].astype(">u2"), old.attrs["sha256"]
        del file["labels/00000000"]
        file.create_dataset("labels/00000000", data=values).attrs["sha256"] = sha256.decode()
        file["labels"].attrs["classes"] = file["labels"].attrs["classes"].decode()
    assert verify(path) == []
    with Shard(path) as shard, ShardWriter(tmp_path / "copy.h5", preprocessing={}) as writer:
        writer.copy(shard, 0)
    with Shard(tmp_path / "copy.h5") as copy:
        assert copy.content_hash == shard.content_hash
        assert copy.label_dataset(0).fletcher32


def test_tables_of_several_sources():
    tables = ClassTables()
    tables.admit("a", [0, 3], targets=("y", "x"), names={0: "background", 3: "lung"})
    tables.admit("b", [0, 3, 5], target="x")
    assert tables.label_classes == ((0, "background"), (3, "lung"), (5, "5"))
    assert tables.target_classes == ("y", "x")
    tables.admit("c", [], target="a")
    assert tables.target_classes == ("a", "x", "y")
    with pytest.raises(InputError, match="d: label value 3 must be 'lung' as in a, got 'rib'"):
        tables.admit("d", [3], names={3: "rib"}, target="new")
    assert tables.options() == {"label_classes": tables.label_classes, "target_classes": ("a", "x", "y")}
    assert ClassTables().options() == {"label_classes": None, "target_classes": None}


def test_pickles_with_labels(tmp_path):
    path = write(tmp_path / "x.h5", [labelled(target="x")])
    shard = Shard(path)
    copy = pickle.loads(pickle.dumps(shard))
    np.testing.assert_array_equal(copy.labels(0)[0], shard.labels(0)[0])
    assert (copy.label_classes, copy.targets.tolist()) == (shard.label_classes, [0])
    packed = pickle.dumps(shard)
    write(path, [labelled(target="y")], overwrite=True)
    with pytest.raises(InputError, match="must not change while it is in use"):
        pickle.loads(packed)
