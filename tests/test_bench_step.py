"""`coverfast bench step`: the baseline learns what coverfast learns, what does not is not timed, parts are told."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import refused
from torch.profiler import record_function
from typer.testing import CliRunner

from coverfast.bench import parts, published_step, step
from coverfast.bench.step import Checks, Result, figures, furthest, measure
from coverfast.bench.step_variants import (
    PLAIN,
    Problem,
    check_variant,
    default_variants,
    problems,
    set_up,
    settings_of,
)
from coverfast.checks import InputError
from coverfast.cli.main import app
from coverfast.methods import gvsl
from coverfast.ops.ncc import ncc_loss
from coverfast.training.assembly import build_method
from coverfast.training.estimate import step_flops
from coverfast.training.settings import Settings, preset_settings

CPU = torch.device("cpu")


def few_levels(preset: str, **changes: object) -> Settings:
    """Settings of a network that is over in milliseconds."""
    s = replace(preset_settings(preset), channels=(8, 16, 24), batch=2, compile=False)
    s = replace(s, crop=(16, 24, 20)[: int(preset[-2])])
    return replace(s, **({"groups": (4, 2, 1), "window": (3,)} if s.method == "cover" else {}), **changes)


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is not measured: a process of its own takes seconds."""
    monkeypatch.setattr(step, "process_growth", lambda *_, **__: 5.0)


# --- the same objective ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["small-2d", "small-3d"])
def test_the_baseline_learns_what_coverfast_learns(preset):
    """Loss and the gradients of all weights, by the definition in float64."""
    checks = Checks(few_levels(preset), CPU)
    for variant in ("published A", "published B, views ready", "coverfast"):
        assert checks.error(variant) <= 1e-11
    assert len(checks.expected) == 1 + len(list(checks.exact.parameters()))
    assert all(float(gradient.abs().max()) > 0 for gradient in checks.expected)


@pytest.mark.parametrize("preset", ["small-2d", "small-3d"])
def test_first_steps_lose_the_same(preset):
    """On the same stored images and draws; noise is another."""
    problem = Problem(few_levels(preset, noise=0.0, boxes=0))
    loop = set_up(problem, "published A", CPU).step
    both_losses, vec, con, norm = figures(problem, set_up(problem, PLAIN, CPU), CPU)
    loss, *both = loop()
    assert both == pytest.approx([float(vec), float(con)], rel=1e-4)
    assert loss == pytest.approx(float(vec + con), rel=1e-4)
    assert both_losses == pytest.approx(float(vec + con))
    assert norm > 0
    assert loop()[0] != pytest.approx(loss, rel=1e-3)  # another batch, other views, other weights


def test_first_steps_of_another_method_are_compared_in_all_its_losses():
    problem = Problem(few_levels("small-gvsl-2d"))
    plain, low = (figures(problem, set_up(problem, f"{PLAIN}{more}", CPU), CPU) for more in ("", " bfloat16"))
    names = {name: i for i, name in enumerate(("loss", "loss_ncc", "loss_smooth", "loss_restore", "grad_norm"))}
    assert len(plain) == len(low) == len(names)
    assert plain[names["loss"]] == pytest.approx(float(sum(plain[1:4])))
    assert plain[names["loss_smooth"]] == 0  # the heads start at no displacement
    assert 0 < furthest(low, plain) < 0.1


def test_the_noise_of_the_baseline_is_as_strong():
    s = few_levels("small-2d", boxes=0, contrast=0.0, brightness=0.0, noise=0.1, probability=1.0)
    problem = Problem(replace(s, crop=(64, 64)))
    method = set_up(problem, PLAIN, CPU).engine.method
    ours = method.prepare(next(step.batches([step.to_device(problem.loaded(method, 1), CPU)], s.seed, print)))
    quiet = Problem(replace(problem.settings, noise=0.0)).published_views(method, 1, CPU)()
    theirs = problem.published_views(method, 1, CPU)()
    for ours_a, theirs_a, clean in zip(ours.x_a, theirs.x_a, quiet.x_a, strict=True):
        assert float((ours_a - clean).std()) == pytest.approx(float((theirs_a - clean).std()), rel=0.1)
        assert not torch.equal(ours_a, theirs_a)


def test_boxes_of_the_baseline_are_ours():
    s = few_levels("small-2d", contrast=0.0, brightness=0.0, noise=0.0, probability=1.0)
    problem = Problem(replace(s, crop=(64, 64)))
    method = set_up(problem, PLAIN, CPU).engine.method
    ours = method.prepare(next(step.batches([step.to_device(problem.loaded(method, 1), CPU)], s.seed, print))).x_a
    theirs, plain = problem.published_views(method, 1, CPU)().x_a, replace(problem.settings, boxes=0)
    clean = Problem(plain).published_views(method, 1, CPU)().x_a
    filled, by_us = (theirs - clean).abs() > 1e-5, (ours - clean).abs() > 1e-5
    assert 0.005 < float(filled.float().mean()) < 0.3
    assert float((filled != by_us).float().mean()) < 1e-3  # a filling may come out as it was


@pytest.mark.parametrize("preset", ["small-gvsl-2d", "small-gvsl-3d"])
def test_another_method_is_held_to_its_definition(preset):
    """Also the gradients of what starts at zero, and of all that lies before it."""
    checks = Checks(few_levels(preset), CPU)
    assert checks.error("coverfast") <= 1e-11
    assert len(checks.expected) == 1 + len(list(checks.exact.parameters()))
    assert all(float(gradient.abs().max()) > 0 for gradient in checks.expected)
    field = checks.exact.match(checks.truth).matched.dvf.detach()
    assert 0.1 < float(field.abs().mean()) < 10


def test_pairs_are_of_different_images():
    problem = Problem(few_levels("small-gvsl-2d"))
    method = set_up(problem, PLAIN, CPU).engine.method
    first, second = (problem.loaded(method, i) for i in (1, 2))
    assert len(first.images) == 4
    assert (first.indices[::2] != first.indices[1::2]).all()
    assert not torch.equal(first.images, second.images)


# --- what is wrong is not timed --------------------------------------------------------------------------------------


def test_what_is_wrong_is_not_timed(no_processes, monkeypatch):
    compose = published_step.eager.compose_eager
    monkeypatch.setattr(published_step.eager, "compose_eager", lambda fine, coarse: compose(fine, 1.01 * coarse))
    good, bad = measure(few_levels("small-2d"), ["coverfast", "published A"], CPU, 1)
    assert good.step_ms > 0
    assert not good.note
    assert bad.note == "wrong: not timed"
    assert bad.errors["small"] > 1e-6
    assert bad.step_ms is bad.peak_mb is bad.mfu is None


def test_a_wrong_gradient_of_another_method_is_not_timed(no_processes, monkeypatch):
    """Of ours alone; the value is right."""

    def steeper(x, y, *args, impl, **options):
        slope = 1.0 if impl == "reference" else 1.001
        return ncc_loss(x, y.detach() + slope * (y - y.detach()), *args, impl=impl, **options)

    monkeypatch.setattr(gvsl, "ncc_loss", steeper)
    (bad,) = measure(few_levels("small-gvsl-2d"), ["coverfast"], CPU, 1)
    assert bad.note == "wrong: not timed"
    assert 1e-6 < bad.errors["small"] < 1e-2
    assert bad.step_ms is bad.peak_mb is bad.mfu is None


def test_other_views_are_wrong(monkeypatch):
    made = published_step.make_views

    def shifted(*args, **kwargs):
        seen = made(*args, **kwargs)
        return seen._replace(psi=seen.psi + 0.01)

    checks = Checks(few_levels("small-2d"), CPU)
    monkeypatch.setattr(published_step, "make_views", shifted)
    assert checks.error("published A") == math.inf


def test_a_first_step_that_differs_is_wrong(no_processes, monkeypatch):
    """What is timed is compared with plain float32 at full size."""
    told = iter([[torch.tensor(1.0)], [torch.tensor(1.05)], [torch.tensor(1.3)]])
    monkeypatch.setattr(step, "figures", lambda *_: next(told))
    found = measure(few_levels("small-2d"), ["coverfast bfloat16", "coverfast bfloat16 contiguous"], CPU, 1)
    assert [r.note for r in found] == ["", "wrong: not timed"]
    assert found[0].precision == "bfloat16"
    assert [r.errors["first step"] for r in found] == pytest.approx([0.05, 0.3])
    assert not Result("", "coverfast", 1, (), "float32", errors={"first step": 0.05}).sound
    assert not Result("", "coverfast", 1, (), errors={"small": math.nan}).sound
    assert not Result("", "published A", 1, (), errors={"small": 1e-5}).sound
    assert math.isnan(furthest([torch.tensor(math.nan), torch.tensor(1.0)], [torch.tensor(1.0)] * 2))


def test_what_fails_leaves_the_rest(no_processes, monkeypatch):
    monkeypatch.setattr(published_step, "MATCHING", {"A": lambda *_, **__: 1 / 0, "B": published_step.MATCHING["B"]})
    bad, good = measure(few_levels("small-2d"), ["published A", "published B"], CPU, 1)
    assert bad.note.startswith("does not run: ZeroDivisionError")
    assert good.step_ms > 0


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setattr(step, "INTERPRETED", True)
    with refused("TRITON_INTERPRET"):
        measure(few_levels("small-2d"), ["coverfast"], CPU, 1)


# --- figures and parts -----------------------------------------------------------------------------------------------


def test_figures_and_parts_of_a_step(no_processes):
    s = few_levels("small-2d")
    for r in measure(s, ["coverfast", "published B"], CPU, 2, profile=True):
        assert (r.note, r.batch, r.crop, r.peak_mb) == ("", 2, (16, 24), 5.0)
        assert r.images_per_s == pytest.approx(2e3 / r.step_ms)
        assert r.mfu == pytest.approx(r.flops / r.step_ms * 1e3 / r.rate)
        assert 0 < r.mfu < 1
        share = {name: ms / sum(r.parts_ms.values()) for name, ms in r.parts_ms.items()}
        assert list(share) == [*parts.PARTS["cover"], parts.OTHER]
        assert share[parts.OTHER] < 0.1, share
        assert all(share[name] > 0 for name in ("views", "backbone", "pyramid", "losses", "optimiser")), share
        assert (share["data"] > 0) == (r.variant == "coverfast")  # the baseline scales its images with its views


def test_figures_and_parts_of_another_method(no_processes):
    s = few_levels("small-gvsl-2d", crop=(32, 48))
    (r,) = measure(s, ["coverfast"], CPU, 1, profile=True)
    assert (r.note, r.batch, r.crop, list(r.errors)) == ("", 2, (32, 48), ["small", "first step"])
    assert r.images_per_s == pytest.approx(2e3 / r.step_ms)
    assert 0 < r.mfu < 1
    share = {name: ms / sum(r.parts_ms.values()) for name, ms in r.parts_ms.items()}
    assert list(share) == ["data", "views", "backbone", "heads", "losses", "optimiser", "other"]
    assert share["other"] < 0.5, share  # a step of milliseconds: what else the machine does may fall between
    assert all(ms > 0 for ms in share.values()), share
    of_cover = step_flops(build_method(few_levels("small-2d", crop=(32, 48)), 2, 1), 2)
    assert r.flops > of_cover  # the same backbone on as many images, and larger heads


def test_backward_counts_with_its_forward():
    x = torch.randn(1, 300, 300, requires_grad=True)

    def once() -> None:
        with record_function("backbone"):
            y = x.sin()
        with record_function("pyramid"):
            z = y
            for _ in range(10):
                z = z @ y / 300
        with record_function("losses"):
            loss = z.sum()
        loss.backward()
        with record_function("optimiser"):
            x.grad = None

    found = parts.milliseconds(once, "cpu", 3)
    total = sum(found.values())
    assert found["pyramid"] > 0.7 * total, found
    assert found[parts.OTHER] < 0.1 * total, found
    assert found["data"] == found["views"] == 0


@pytest.mark.parametrize(
    ("preset", "marked"),
    [("small-2d", {"", "backbone", "pyramid"}), ("small-gvsl-2d", {"", "backbone", "matching", "restoration"})],
)
def test_marks_leave_no_trace(preset, marked):
    s = few_levels(preset)
    method = set_up(Problem(s), "coverfast eager", CPU).engine.method
    with parts.marked(method, s.method):
        assert {name for name, module in method.named_modules() if "forward" in vars(module)} == marked
    assert all("forward" not in vars(module) for module in method.modules())


# --- variants --------------------------------------------------------------------------------------------------------


def test_words_change_settings():
    s = preset_settings("paper-3d")
    assert settings_of(s, "coverfast") == s
    found = settings_of(s, "coverfast eager float32 channels_last")
    assert (found.compile, found.precision, found.layout) == (False, "float32", "channels_last")
    assert settings_of(s, "coverfast graphs").cuda_graphs
    for name in ("published A", "published B, views ready", "coverfast", "coverfast compiled recompute"):
        check_variant(name)
    for name in ("", "published C", "coverfast fast", "eager", "coverfast  views ready"):
        with pytest.raises(InputError, match="against must be one of published A"):
            check_variant(name)


def test_published_code_is_that_of_cover():
    small = preset_settings("small-gvsl-2d")
    assert default_variants(small) == ("coverfast", PLAIN)
    assert set(default_variants(preset_settings("small-2d"))) > {"published A", "published B"}
    check_variant("coverfast eager", [small])
    check_variant("published A", [preset_settings("small-2d")])
    with refused("against", "small-gvsl-2d", "cover", "published A"):
        check_variant("published A", [preset_settings("small-2d"), small])


def test_presets_and_crops_are_paired():
    found = problems(["small-2d", "small-3d"], [(32,), (16, 48), (16, 16, 32)], batch=3, precision="bfloat16")
    assert [(s.preset, s.crop) for s in found] == [
        ("small-2d", (32,)),
        ("small-2d", (16, 48)),
        ("small-3d", (32,)),
        ("small-3d", (16, 16, 32)),
    ]
    assert {(s.batch, s.precision) for s in found} == {(3, "bfloat16")}
    assert [s.crop for s in problems(["small-2d", "small-3d"])] == [(128,), (64,)]
    assert [s.preset for s in problems(["small-2d", "small-3d"], [(16, 16, 16)], only_fitting=True)] == ["small-3d"]


def test_the_dtype_is_that_of_variants_that_name_none():
    (s,) = problems(["small-2d"], [(16,)], precision="bfloat16")
    assert settings_of(s, "coverfast eager").precision == "bfloat16"
    assert settings_of(s, "coverfast float32").precision == "float32"
    small = few_levels("small-2d", precision="bfloat16")
    assert set_up(Problem(small), "coverfast", CPU).dtype == torch.bfloat16
    published = set_up(Problem(small), "published A", CPU)
    assert published.dtype == torch.float32
    assert published.facts["precision"] == "float32"


def test_images_are_stored_integers_larger_than_the_crop():
    flat, deep = Problem(preset_settings("small-2d")), Problem(replace(preset_settings("paper-3d"), batch=1))
    assert (flat.images.dtype, flat.images.shape) == (np.uint8, (8, 1, 192, 192))
    assert (deep.images.dtype, deep.images.shape) == (np.uint16, (2, 1, 160, 160, 128))
    method = set_up(flat, "coverfast", CPU).engine.method
    loaded = flat.loaded(method, 2)
    assert loaded.images.dtype == torch.uint8
    first, last = loaded.corner[1].tolist(), (loaded.corner + loaded.extents)[1].tolist()
    whole = flat.images[int(loaded.indices[1]), :, first[0] : last[0], first[1] : last[1]]
    part = loaded.images[1, :, : whole.shape[1], : whole.shape[2]]
    assert torch.equal(part, torch.from_numpy(whole))


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_prints_and_saves(no_processes, monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "milliseconds", lambda *_: dict.fromkeys((*parts.PARTS["cover"], parts.OTHER), 3.0))
    file = tmp_path / "step.json"
    command = "bench step --preset small-2d --sizes 16 --sizes 16,32 --batch 1 --repeats 1 --device cpu --profile"
    command += " --dtype bfloat16 --against coverfast"
    command = [*command.split(), "--against", "published A", "--save", str(file)]
    written = []
    real = step.measure
    monkeypatch.setattr(step, "measure", lambda *a, **k: (written.append(file.exists()), real(*a, **k))[1])
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    words = ("batch 1, crop 16 x 16", "batch 1, crop 16 x 32", "published A", "float32 contiguous", "MFU", "backbone")
    for word in (*words, "14.3%", "torch 2", "commit", "threads"):
        assert word in done.output
    assert written == [False, True], "what is there is saved after every crop"
    saved = json.loads(file.read_text())
    assert [row["variant"] for row in saved["rows"]] == ["coverfast", "published A"] * 2
    assert [row["crop"] for row in saved["rows"]] == [[16, 16]] * 2 + [[16, 32]] * 2
    assert [row["precision"] for row in saved["rows"]] == ["bfloat16", "float32"] * 2
    assert all(row["step_ms"] > 0 and row["parts_ms"]["backbone"] > 0 for row in saved["rows"])
    assert saved["provenance"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "published C"], ("against", "published A", "eager")),
        (["--preset", "small-gvsl-3d", "--against", "published A"], ("against", "small-gvsl-3d", "published A")),
        (["--preset", "large-4d"], ("preset", "paper-2d")),
        (["--preset", "small-2d", "--sizes", "40"], ("divisible by 16", "40")),
        (["--preset", "small-2d", "--sizes", "16,16,16"], ("sizes", "2 axes", "small-2d", "(16, 16, 16)")),
        (["--sizes", "16,16,16,16"], ("sizes", "small-2d", "(16, 16, 16, 16)")),
        (["--dtype", "float16"], ("dtype", "float32 or bfloat16", "float16")),
    ],
)
def test_command_refuses_in_one_sentence(arguments, words):
    with refused(*words):
        CliRunner().invoke(app, ["bench", "step", "--device", "cpu", *arguments], catch_exceptions=False)
