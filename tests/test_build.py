"""Builds: content that depends on files and settings alone, splits without leakage, little memory."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coverfast.checks import InputError
from coverfast.ingest import build_shard, preprocessing
from coverfast.ingest.splits import draw_splits, duplicates, split_counts
from coverfast.samples import SPLITS
from coverfast.shards import Shard, verify

RADIOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "chestxray"
RAW = preprocessing("raw")


def npy(path, seed=0, shape=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8))
    return path


def patients(folder, count=12, images=2):
    for i in range(count * images):
        npy(folder / f"p{i // images:02d}_{i % images}.npy", i, (20, 30 + i))
    return folder


def build(paths, out, **options):
    return build_shard(paths, out, **{"preprocessing": RAW, "workers": 0} | options)


# ---- content


def test_report_progress_and_what_lies_in_the_shard(tmp_path):
    for i in range(3):
        npy(tmp_path / "in" / f"{i}.npy", i, (4, 5 + i))
    (tmp_path / "in" / "readme.md").touch()
    calls, notes = [], []
    report = build(
        tmp_path / "in", tmp_path / "new" / "s.h5", progress=lambda *call: calls.append(call), note=notes.append
    )
    assert (report.samples, report.kept, report.ignored, report.skipped) == (3, 0, 1, [])
    assert report.paths == [tmp_path / "new" / "s.h5"]
    assert report.size_bytes == report.paths[0].stat().st_size
    assert (report.splits, report.duplicates) == ({"train": (3, 3)}, 0)
    for stage in ("reading", "writing", "checking"):
        assert [call[1:] for call in calls if call[0] == stage][-3:] == [(1, 3), (2, 3), (3, 3)]
    assert re.fullmatch(
        r"3 samples take about [\d.]+ KiB, 0 B more while they are built; [\d.]+ [MGT]iB are free", notes[0]
    )
    assert [p.name for p in report.paths[0].parent.iterdir()] == ["s.h5"]
    with Shard(report.paths[0]) as shard:
        assert shard.preprocessing == RAW
        assert shard.sizes.tolist() == [[4, 5], [4, 6], [4, 7]]
        for i in range(3):
            np.testing.assert_array_equal(shard.read(i).pixels[0], np.load(tmp_path / "in" / f"{i}.npy"))


def test_the_same_bytes_for_any_workers_and_order_of_folders(tmp_path):
    patients(tmp_path / "a" / "in")
    for path in sorted((tmp_path / "a" / "in").iterdir(), reverse=True):
        (tmp_path / "b" / "in").mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / "in" / path.name).write_bytes(path.read_bytes())
    options = {"val_fraction": 0.25, "test_fraction": 0.25, "group": "p[0-9]+"}
    contents = set()
    for number, (folder, workers) in enumerate([("a", 0), ("b", 1), ("a", 3)]):
        report = build(tmp_path / folder / "in", tmp_path / f"{number}.h5", workers=workers, **options)
        contents.add(report.paths[0].read_bytes())
    assert len(contents) == 1
    with Shard(tmp_path / "0.h5") as shard:
        assert [shard.source(i) for i in range(3)] == ["in/p00_0.npy", "in/p00_1.npy", "in/p01_0.npy"]
        assert shard.info(5).group == "p02"


def test_presets_are_applied_and_kept_apart(tmp_path):
    npy(tmp_path / "in" / "a.npy", 0, (40, 60))
    chosen = preprocessing("chest-xray", size=24)
    report = build(tmp_path / "in", tmp_path / "s.h5", preprocessing=chosen)
    with Shard(report.paths[0]) as shard:
        assert shard.sizes.tolist() == [[24, 24]]
        assert shard.preprocessing == chosen
    npy(tmp_path / "in" / "b.npy", 0, (4, 5, 6))
    with pytest.raises(InputError, match=r"in/b.npy must be 2D for the preset chest-xray"):
        build(tmp_path / "in", tmp_path / "t.h5", preprocessing=chosen)


def test_two_files_of_one_name_are_two_samples(tmp_path):
    for number in (1, 2):
        npy(tmp_path / str(number) / "in" / "a.npy", number)
    report = build([tmp_path / "1" / "in", tmp_path / "2" / "in"], tmp_path / "s.h5")
    assert (report.samples, report.duplicates) == (2, 0)


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_compression(tmp_path, compression):
    np.save(tmp_path / "a.npy", np.zeros((300, 300), np.uint8))
    path = build(tmp_path / "a.npy", tmp_path / "s.h5", compression=compression).paths[0]
    assert (path.stat().st_size < 90_000) == (compression == "gzip")


def test_several_shards_of_a_size(tmp_path):
    folder = tmp_path / "in"
    for i in range(9):
        npy(folder / f"{i}.npy", i, (100, 400 if i == 4 else 100))
    whole = build(folder, tmp_path / "whole.h5")
    report = build(folder, tmp_path / "s.h5", shard_size=36_000)
    assert [p.name for p in report.paths] == [f"s-0000{i}.h5" for i in range(len(report.paths))]
    assert report.size_bytes == sum(p.stat().st_size for p in report.paths)
    sources, sizes = [], []
    for path in report.paths:
        assert verify(path) == []
        with Shard(path) as shard:
            names = [shard.source(i) for i in range(len(shard))]
        sources += names
        sizes.append(path.stat().st_size)
        assert sizes[-1] <= 36_000 or names == ["in/4.npy"]
    with Shard(whole.paths[0]) as shard:
        assert sources == [shard.source(i) for i in range(9)]
    assert sizes[0] > 20_000
    assert not (tmp_path / "s.h5").exists()

    with pytest.raises(InputError, match=r"s-00000.h5 must be a new file, it exists already"):
        build(folder, tmp_path / "s.h5", shard_size=10**9)
    (tmp_path / "s-extra.h5").touch()
    report = build(folder, tmp_path / "s.h5", shard_size=10**9, overwrite=True)
    # A shard of the older, longer row would be read beside the new one.
    assert sorted(p.name for p in tmp_path.glob("s-*")) == ["s-00000.h5", "s-extra.h5"]
    assert report.paths[0].read_bytes() == whole.paths[0].read_bytes()


def test_the_size_of_shards_of_many_small_or_long_named_samples(tmp_path):
    for i in range(60):
        npy(tmp_path / "in" / f"{'n' * (i % 7 * 30)}{i}.npy", i, (3, 4))
    report = build(tmp_path / "in", tmp_path / "s.h5", shard_size=40_000)
    sizes = [p.stat().st_size for p in report.paths]
    assert max(sizes) <= 40_000
    assert min(sizes[:-1]) > 18_000


def test_bad_files_stop_the_build_or_are_skipped(tmp_path):
    folder = tmp_path / "in"
    for i in range(3):
        npy(folder / f"{i}.npy", i)
    (folder / "1.npy").write_bytes(b"")
    (folder / "x.dcm").write_bytes(b"no DICOM")
    said = f"{folder}/1.npy cannot be read as npy: it is empty"
    with pytest.raises(InputError, match=r"x.dcm cannot be read as DICOM: .*; skip_bad=True \(--skip-bad\) leaves"):
        build(folder, tmp_path / "s.h5")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    report = build(folder, tmp_path / "s.h5", skip_bad=True)
    assert (report.samples, len(report.skipped), report.skipped[1]) == (2, 2, said)
    (folder / "x.dcm").unlink()
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        build(folder, tmp_path / "t.h5")
    told = f"finished samples stay in {tmp_path}/t.h5.partial, the same command resumes, other settings need restart="
    assert told in str(caught.value)
    report = build(folder, tmp_path / "t.h5", skip_bad=True)
    assert (report.kept, report.skipped) == (1, [said])
    assert (tmp_path / "t.h5").read_bytes() == (tmp_path / "s.h5").read_bytes()
    with pytest.raises(InputError, match=r"got none of 1: .*1.npy cannot be read"):
        build(folder / "1.npy", tmp_path / "u.h5", skip_bad=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "s.h5", "t.h5"]


def test_one_dimension_and_number_of_channels(tmp_path):
    npy(tmp_path / "in" / "0.npy", 0, (6, 7, 8))
    npy(tmp_path / "in" / "1.npy", 1, (2, 6, 7, 8))
    with pytest.raises(InputError, match=r"in/1.npy must have 1 channels like .*in/0.npy, got 2"):
        build(tmp_path / "in", tmp_path / "s.h5", skip_bad=True)
    npy(tmp_path / "in" / "1.npy")
    with pytest.raises(InputError, match=r"in/1.npy must be 3D like .*in/0.npy, got 2D; ndim=3"):
        build(tmp_path / "in", tmp_path / "t.h5", skip_bad=True)


def test_one_dimension_of_a_mixed_tree(tmp_path):
    for i in range(3):
        npy(tmp_path / "in" / f"{i}.npy", i, (6, 7, 8) if i % 2 else (6, 7))
    report = build(tmp_path / "in", tmp_path / "flat.h5", ndim=2)
    assert (report.samples, report.unwanted, report.skipped) == (2, 1, [])
    assert build(tmp_path / "in", tmp_path / "deep.h5", ndim=3, workers=1).samples == 1
    with pytest.raises(InputError, match=r"in/1.npy must be 2D for the preset chest-xray, got 3D; skip_bad"):
        build(tmp_path / "in", tmp_path / "x.h5", preprocessing=preprocessing("chest-xray"))
    skipped = build(tmp_path / "in", tmp_path / "x.h5", preprocessing=preprocessing("chest-xray"), skip_bad=True)
    assert (skipped.samples, len(skipped.skipped)) == (2, 1)
    with pytest.raises(InputError, match="ndim must be 2 or 3"):
        build(tmp_path / "in", tmp_path / "y.h5", ndim=4)


def test_refusals_before_anything_is_read(tmp_path):
    folder = patients(tmp_path / "in", 2)
    (tmp_path / "old.h5").write_text("mine")
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "link.h5").symlink_to("nowhere")
    calls = []
    for changes, words in (
        ({"out": "old.h5"}, "old.h5 must be a new file, it exists already"),
        ({"out": "link.h5"}, "link.h5 must be a new file, it exists already"),
        ({"out": "folder.h5", "overwrite": True}, "must be a file name, got a folder"),
        ({"val_fraction": 1.5}, "val_fraction must be a number from 0 to 1, got 1.5"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, "at most 1 together, got 1.2"),
        ({"split_seed": -1}, "split_seed must be an int"),
        ({"workers": -1}, "workers must be an int from 0 to 1024, got -1"),
        ({"shard_size": 0}, "shard_size must be a positive number of bytes, got 0"),
        ({"compression": "zip"}, "compression must be one of none, gzip, got 'zip'"),
        ({"group": "p([0-9]+)", "val_fraction": 0.3, "test_fraction": 0.3}, "at least 1 group each, got 2 group"),
        ({"out": "old.h5/x.h5"}, "cannot be written: Not a directory"),
        ({"out": "new/"}, "out must be a file name, got '.*new/'"),
    ):
        options = {"out": "s.h5", "progress": lambda *call: calls.append(call)} | changes
        with pytest.raises(InputError, match=words):
            build(folder, f"{tmp_path}/{options.pop('out')}", **options)
    assert calls == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.h5", "in", "link.h5", "old.h5"]
    assert (tmp_path / "old.h5").read_text() == "mine"
    build(folder, tmp_path / "old.h5", overwrite=True)
    assert verify(tmp_path / "old.h5") == []


def test_too_little_disk_is_known_beforehand(tmp_path, monkeypatch):
    import shutil

    folder = patients(tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    with pytest.raises(InputError, match=r"s.h5 must have about [\d.]+ KiB of disk to be built, got 48.8 KiB free"):
        build(folder, tmp_path / "s.h5")
    assert len(list((tmp_path / "s.h5.partial").rglob("*.h5"))) == 8
    assert build(folder, tmp_path / "s.h5", disk_check=False).kept == 8


def test_the_estimate_holds_what_a_build_of_small_images_takes(tmp_path):
    for i in range(300):
        npy(tmp_path / "in" / f"{i}.npy", i, (28, 28))
    taken, notes = [], []

    def look(stage, done, total):
        if stage == "reading" and done == 8:  # the samples from which the estimate is made lie there already
            taken.append(sum(p.stat().st_blocks * 512 for p in (tmp_path / "s.h5.partial").glob("??/*.h5")))
        if (stage, done) == ("writing", total):
            taken.append(sum(p.stat().st_blocks * 512 for p in (tmp_path / "s.h5.partial").glob("??/*.h5")))

    report = build(tmp_path / "in", tmp_path / "s.h5", progress=look, note=notes.append)
    shard, more = (float(number) * 1024**power for number, power in _sizes(notes[0]))
    assert report.size_bytes <= shard < 2 * report.size_bytes
    assert taken[1] - taken[0] <= more < 2 * (taken[1] - taken[0])


def _sizes(text):
    units = ["B", "KiB", "MiB"]
    return [(number, units.index(unit)) for number, unit in re.findall(r"([\d.]+) ([KM]?i?B)", text)[:2]]


def test_the_disk_must_have_a_tenth_more(tmp_path, monkeypatch):
    import shutil

    folder = patients(tmp_path / "in", 4, 1)  # all of them are probes: nothing but the shard is left to write
    notes = []
    monkeypatch.setattr("coverfast.ingest.build.byte_count", str)
    report = build(folder, tmp_path / "s.h5", note=notes.append)
    size = int(re.findall(r"about (\d+)", notes[0])[0])
    assert size >= report.size_bytes - 8192
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((size * 1.09, False), (size * 1.11, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=int(free)))
        if enough:
            build(folder, tmp_path / "t.h5")
        else:
            with pytest.raises(InputError, match=f"must have about {round(size * 1.1)} of disk"):
                build(folder, tmp_path / "t.h5")


# ---- splits


samples = st.lists(
    st.tuples(st.sampled_from(["", "a", "b", "c", "d", "e", "f"]), st.integers(0, 30)), min_size=3, max_size=60
)
fractions = st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5])


@given(samples, fractions, fractions, st.integers(0, 5), st.randoms())
def test_no_group_and_no_image_is_in_two_splits(drawn, val, test, seed, random):
    groups, hashes = [g for g, _ in drawn], [b"%032d" % h for _, h in drawn]
    options = {"val_fraction": val, "test_fraction": test, "seed": seed}
    components = _components([{("g", g or (i,)), ("h", h)} for i, (g, h) in enumerate(drawn)])
    if len(components) < 1 + (val > 0) + (test > 0 and val + test < 1):
        with pytest.raises(InputError, match="must have at least 1 group each"):
            draw_splits(groups, hashes, **options)
        return
    splits, sets = draw_splits(groups, hashes, **options)
    assert len(components) == len(set(sets.tolist()))
    for members in components:
        assert len({int(splits[i]) for i in members}) == 1
        assert len({int(sets[i]) for i in members}) == 1
    present = {SPLITS[s] for s in splits}
    wanted = {"val": val, "test": test, "train": 1 - val - test}
    assert present == {name for name, fraction in wanted.items() if fraction > 0}
    # Off by no more than half the largest group, unless groups are too few to choose from.
    largest = max(map(len, components))
    if len(components) > 2 and largest == 1:
        assert abs((splits == 1).sum() - val * len(drawn)) <= max(0.5, 1 - val * len(drawn))
    order = list(range(len(drawn)))
    random.shuffle(order)
    again, _ = draw_splits([groups[i] for i in order], [hashes[i] for i in order], **options)
    if largest == 1:  # sets of equal rank do not exist; their sizes decide in no order
        assert [int(splits[i]) for i in order] == again.tolist()
    counts = split_counts(splits, sets)
    assert sum(n for n, _ in counts.values()) == len(drawn)
    assert sum(n for _, n in counts.values()) == len(components)


def _components(labels):
    """Connected sets of indices, by joining until nothing changes."""
    sets = [({i}, set(found)) for i, found in enumerate(labels)]
    changed = True
    while changed:
        changed = False
        for a in range(len(sets)):
            for b in range(a + 1, len(sets)):
                if sets[a][1] & sets[b][1]:
                    sets[a] = (sets[a][0] | sets[b][0], sets[a][1] | sets[b][1])
                    del sets[b]
                    changed = True
                    break
            if changed:
                break
    return [members for members, _ in sets]


def test_splits_have_the_sizes_asked_for_and_move_little():
    hashes = [b"%032d" % i for i in range(1000)]
    groups = [f"patient {i // 4}" for i in range(1000)]
    draw = {"val_fraction": 0.1, "test_fraction": 0.2, "seed": 1}
    splits, sets = draw_splits(groups, hashes, **draw)
    assert split_counts(splits, sets) == {"train": (700, 175), "val": (100, 25), "test": (200, 50)}
    fewer, _ = draw_splits(groups[:900], hashes[:900], **draw)
    assert (fewer != splits[:900]).sum() < 40
    other, _ = draw_splits(groups, hashes, **draw | {"val_fraction": 0.3})
    assert ((other == 2) == (splits == 2)).all()
    other, _ = draw_splits(groups, hashes, **draw | {"test_fraction": 0.4})
    assert ((other == 1) == (splits == 1)).all()
    reseeded, _ = draw_splits(groups, hashes, **draw | {"seed": 2})
    assert (reseeded != splits).sum() > 200
    everything, _ = draw_splits(groups, hashes, val_fraction=0.0, test_fraction=1.0, seed=0)
    assert (everything == 2).all()


def test_a_large_group_does_not_make_a_small_split():
    groups = ["large"] * 80 + [f"{i}" for i in range(20)]
    for seed in range(20):
        splits, _ = draw_splits(
            groups, [b"%032d" % i for i in range(100)], val_fraction=0.1, test_fraction=0.0, seed=seed
        )
        assert (splits == 1).sum() == 10


def test_splits_of_a_build_keep_patients_and_duplicates_together(tmp_path):
    folder = patients(tmp_path / "in")
    twin = folder / "p05_0.npy"
    (folder / "p09_9.npy").write_bytes(twin.read_bytes())  # joins patients 5 and 9
    report = build(folder, tmp_path / "s.h5", val_fraction=0.3, test_fraction=0.2, group="p[0-9]+", split_seed=3)
    assert report.duplicates == 1
    assert report.duplicate_pairs == [("in/p05_0.npy", "in/p09_9.npy")]
    of_patient: dict[str, set[str]] = {}
    with Shard(report.paths[0]) as shard:
        for i in range(len(shard)):
            of_patient.setdefault(shard.info(i).group, set()).add(shard.info(i).split)
    assert len(of_patient) == 12
    assert all(len(splits) == 1 for splits in of_patient.values())
    assert of_patient["p05"] == of_patient["p09"]
    assert sum(count for count, _ in report.splits.values()) == 25
    assert abs(report.splits["val"][0] - 7.5) <= 2.5
    assert abs(report.splits["test"][0] - 5) <= 2.5
    assert sum(groups for _, groups in report.splits.values()) == 11


def test_splits_without_groups_are_told(tmp_path):
    folder = patients(tmp_path / "in", 4)
    options = {"val_fraction": 0.3, "test_fraction": 0.3}
    for name, changes, told in (
        ("none", {}, True),
        ("test", {"val_fraction": 0.0}, True),
        ("named", {"group": "p[0-9]+"}, False),
        ("unsplit", {"val_fraction": 0.0, "test_fraction": 0.0}, False),
    ):
        notes: list[str] = []
        build(folder, tmp_path / f"{name}.h5", note=notes.append, **options | changes)
        said = "no groups are known: every image counts as a patient of its own; group=REGEX (--group) finds patients"
        assert [note.startswith(said) for note in notes] == [True, False][not told :]


def test_duplicates():
    assert duplicates([b"a", b"b", b"a", b"a", b"b"], 2) == (3, [(0, 2), (0, 3)])


# ---- memory


MEMORY = """
    import resource, sys
    from coverfast.ingest import build_shard, preprocessing
    if __name__ == "__main__":
        build_shard(sys.argv[1], sys.argv[2], preprocessing=preprocessing("raw"), workers=1, val_fraction=0.1)
        for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            print(resource.getrusage(whose).ru_maxrss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    peaks = []
    for count in (100, 1000):
        for i in range(count):
            npy(tmp_path / str(count) / f"{i}.npy", i, (256, 256))
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(MEMORY),
            str(tmp_path / str(count)),
            str(tmp_path / f"{count}.h5"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        peaks.append([int(v) for v in done.stdout.split()])
    parent, worker = np.subtract(peaks[1], peaks[0])
    # 900 more images are 57,600 KiB of pixels. The metadata cache of HDF5 grows to its limit of 32 MiB on the way.
    assert parent < (36 << 10) + 900 * 4
    assert worker < 10 << 10


# ---- real files


@pytest.mark.skipif(not RADIOGRAPHS.is_dir(), reason="the shared radiographs are not here")
def test_real_radiographs(tmp_path):
    image = pytest.importorskip("PIL.Image")
    files = sorted(RADIOGRAPHS.glob("*.png"))
    report = build(RADIOGRAPHS, tmp_path / "x.h5", preprocessing=preprocessing("chest-xray", size=192), workers=1)
    assert (report.samples, report.skipped) == (len(files), [])
    assert verify(report.paths[0]) == []
    with Shard(report.paths[0]) as shard:
        assert shard.sizes.tolist() == [[192, 192]] * len(files)
        for i, file in enumerate(files):
            assert shard.source(i) == f"chestxray/{file.name}"
            with image.open(file) as opened:
                mean = np.asarray(opened.convert("L")).mean()
            assert abs(shard.read(i).pixels.mean() - mean) < 0.5
    whole = build(files[0], tmp_path / "whole.h5").paths[0]
    with Shard(whole) as shard, image.open(files[0]) as opened:
        np.testing.assert_array_equal(shard.read(0).pixels[0], np.asarray(opened.convert("L")))


def test_a_real_brain(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    template = pytest.importorskip("nilearn.datasets").load_mni152_template(resolution=2)
    nibabel.save(template, tmp_path / "mni.nii.gz")
    (path,) = build(tmp_path / "mni.nii.gz", tmp_path / "mni.h5").paths
    assert verify(path) == []
    with Shard(path) as shard:
        assert shard.sizes.tolist() == [list(template.shape[::-1])]
        sample = shard.read(0)
    assert sample.spacing == pytest.approx((2, 2, 2))
    assert sample.original is not None
    assert sample.original.shape == template.shape
    brain = sample.normalised()[0] > 0.2
    # Superior is up: the vertex is narrower than the temporal lobes; left and right are alike.
    depth, _, width = brain.shape
    assert brain[depth * 4 // 5].sum() < brain[depth // 3].sum()
    assert brain[..., : width // 2].sum() == pytest.approx(brain[..., -(width // 2) :].sum(), rel=0.05)


def test_nothing_that_identifies_lies_in_pieces_or_shards(tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import SECRETS, sha, stack, uid

    folder = tmp_path / "Roe Jane 19610203"
    for number in range(2):
        stack(folder / "Jane", 4, series=f"s{number}", seed=number)
    before = {}

    def look(stage, done, total):
        if stage == "writing" and done == total:
            before.update({p: p.read_bytes() for p in (tmp_path / "s.h5.partial").rglob("*") if p.is_file()})

    report = build(folder, tmp_path / "s.h5", compression="none", progress=look)
    assert len(before) >= 4  # two pieces, settings, lock
    before[report.paths[0]] = report.paths[0].read_bytes()
    for path, content in before.items():
        text = content + path.name.encode()
        for secret in (*SECRETS.values(), "Roe", "Jane", "19610203", uid("s0"), uid("s1"), uid("study")):
            assert secret.encode() not in text
            assert secret.encode("utf-16-le") not in text
    with Shard(report.paths[0]) as shard:
        assert {shard.source(i)[:6] for i in range(2)} == {"dicom/"}
        assert {shard.info(i).group for i in range(2)} == {f"patient-{min(sha(uid(s)) for s in ('s0', 's1'))}"}
    assert set(report.splits) == {"train"}
