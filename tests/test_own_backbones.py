"""Networks that are not the U-Net: pyramids that end above the pixel, batch norms, dropout, code of the user's own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from own_network import Small
from strategies import assert_near
from strategies import refused as declined
from test_finetune import labelled
from training_runs import cli, lines, make_shard, ready, refused, resume, same, start, together, weights

from coverfast import Cover, InputError, VectorPyramid, consistency_loss, load_backbone, upsample_dvf, vector_loss
from coverfast.backbones import Adapted, choose
from coverfast.downstream import plan as downstream
from coverfast.downstream.network import load_network
from coverfast.geometry import downsample_dvf
from coverfast.methods import Batch
from coverfast.methods.cover import Matched
from coverfast.methods.cover_monitor import figures, look
from coverfast.report import Pictures, write_report

CODE = Path(__file__).with_name("own_network.py")
OWN = f"{CODE}:Small"


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shard(tmp_path_factory.mktemp("shards") / "small.h5", count=4, size=64)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("shards") / "labelled.h5")


def own(ndim: int = 2, **args: object) -> Adapted:
    words = [f"{name}={value!r}" for name, value in {"normed": False, **args}.items()]
    found = choose(OWN, words, ndim=ndim, in_channels=1)
    assert isinstance(found, Adapted)
    return found


def method(ndim: int = 2, crop: int = 32, **args: object) -> Cover:
    torch.manual_seed(3)
    backbone = own(ndim, **args)
    return Cover(backbone, VectorPyramid(ndim, backbone.feature_channels, (2, 1, 1), 4, 3), crop=crop)


def batch(ndim: int = 2, size: int = 40, count: int = 4, iteration: int = 7) -> Batch:
    images = torch.rand(count, 1, *[size] * ndim, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images[..., ::4, ::4], scale_factor=4, mode="bilinear") if ndim == 2 else images
    corner = torch.zeros(count, ndim, dtype=torch.long)
    return Batch(images, torch.tensor([[size] * ndim] * count), corner, torch.arange(count), 4, iteration)


def tiny(**more: object) -> dict[str, object]:
    return {"channels": (16, 32, 64, 128, 256), "groups": (2, 1, 1), "backbone": OWN, "layout": "contiguous", **more}


# --- a pyramid that ends above the pixel ----------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
def test_losses_of_a_field_that_is_coarser_than_the_image(ndim):
    cover, images = method(ndim), batch(ndim)
    views, levels, features = cover.match(cover.prepare(images))
    assert [f.shape[-1] for f in features] == [2, 4, 8]
    field = levels[-1]
    for size in (16, 32):
        field = upsample_dvf(field, [size] * ndim)
    truth, mask = views.dvf, views.mask
    expected = vector_loss(field, truth, mask)
    for _ in range(2):
        truth, mask = downsample_dvf(truth, mask)
    assert mask.any()
    expected = expected + consistency_loss(*features[-1].chunk(2), truth, mask)
    out = cover(cover.prepare(images))
    assert_near(out.loss, expected, atol=1e-5, rtol=1e-5)
    found = cover.figures({name: float(value) for name, value in out.sums.items()})
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["mask"] == pytest.approx(views.mask.float().mean().item())


def test_the_gradient_does_not_depend_on_how_a_batch_is_split():
    cover, whole = method(), batch()
    found = []
    for parts in (1, 2, 4):
        cover.zero_grad()
        views = [cover.prepare(part) for part in whole.parts(parts)]
        denominator = torch.stack([cover.count(v) for v in views]).sum(0)
        outcomes = [cover(v, denominator if parts > 1 else None) for v in views]
        sum(o.loss for o in outcomes).backward()
        sums = {name: sum(float(o.sums[name]) for o in outcomes) for name in outcomes[0].sums}
        used = [p.grad for p in cover.parameters() if p.grad is not None]
        found.append((cover.figures(sums), torch.cat([g.flatten() for g in used])))
    for told, gradient in found[1:]:
        assert told == pytest.approx(found[0][0], rel=1e-5)
        assert_near(gradient, found[0][1], atol=1e-5 * found[0][1].abs().max().item(), rtol=1e-3)


def test_the_monitor_tells_of_levels_in_their_own_pixels():
    cover, images = method(), batch()
    with torch.no_grad():
        views, levels, features = cover.match(cover.prepare(images))
    found = {name: value.numpy() for name, value in look(cover, Matched(views, levels, features), 7).items()}
    truth, mask = cover.truth(views)
    error = (levels[-1] - truth).square().sum(1, keepdim=True).sqrt()[mask].sum().item()
    assert found["errors"].shape == (3, 3)
    assert found["errors"][-1] == pytest.approx([error, found["errors"][-1][1], mask.sum().item()], rel=1e-5)
    assert found["pixels"] == views.mask.sum().item()
    far = (views.dvf.abs() > 4 * cover.pyramid.reach[0]).any(1, keepdim=True) & views.mask
    assert figures(found)["beyond_reach"] == pytest.approx(far.sum().item() / views.mask.sum().item())


def test_pictures_are_drawn_at_the_size_of_the_image(tmp_path):
    pytest.importorskip("matplotlib")
    cover = method().eval()
    seen = Pictures.of(cover.pictures(batch(count=1)))
    assert seen.prediction.shape == seen.dvf_true.shape == (2, 32, 32)
    assert [seen.stride(level) for level in range(3)] == [16, 8, 4]
    error, _ = seen.end_point()
    inside = seen.mask[0].astype(bool)
    assert error == pytest.approx(((seen.prediction - seen.dvf_true) ** 2).sum(0)[inside].__pow__(0.5).mean(), rel=1e-5)
    assert write_report(tmp_path / "report", seen, {}, title="own").is_file()


# --- training -----------------------------------------------------------------------------------------------------


def test_own_code_pretrains_and_the_weights_come_back(shard, tmp_path, capsys):
    run = start(shard, tmp_path / "run", iterations=60, lr=3e-3, strength=0.3, batch=4, **tiny(crop=(64,)))
    found = lines(run)
    first, last = (sum(r["epe_ratio"] for r in part) / 10 for part in (found[:10], found[-10:]))
    assert last < 0.9 * first
    assert 'backbone = "' in run.config.read_text()
    assert "groups = [2, 1, 1]" in run.config.read_text()
    for source in (run.backbone, run.folder):
        with declined("one of your own", f"--backbone {OWN}"):
            load_backbone(source)
    loaded = load_backbone(run.folder, own=OWN)
    state = weights(run)
    assert "first.0.weight" in state  # the network's own names
    assert same(loaded.core.state_dict(), state)
    assert f"{len(state)} matched, 0 missing, 0 unexpected, 0 reshaped" in capsys.readouterr().out
    plain = Small(2, 1)
    plain.load_state_dict(state)
    x = torch.rand(1, 1, 32, 32)
    for ours, theirs in zip(loaded(x), plain.eval()(x), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_and_running_statistics_resume_to_the_same_bits(shard, tmp_path):
    flags = tiny(backbone_args=("drop=0.3",), checkpoint_every=2)
    straight = start(shard, tmp_path / "straight", iterations=4, **flags)
    start(shard, tmp_path / "run", iterations=2, **flags)
    torch.manual_seed(1234)  # what another process may have drawn before
    torch.rand(17)
    run = resume(tmp_path / "run", iterations=4).start()
    assert same(weights(straight), weights(run))
    assert not same(weights(straight), weights(start(shard, tmp_path / "other", iterations=4, **flags, seed=5)))


def test_a_step_that_is_not_kept_moves_no_statistics(shard, tmp_path):
    found = ready(shard, tmp_path / "run", iterations=4, **tiny(backbone_args=("drop=0.3",)))
    engine = found.engine
    engine.method.train()
    before = {name: b.clone() for name, b in engine.method.named_buffers()}
    assert len(before) == 9

    def after() -> dict[str, torch.Tensor]:
        return dict(engine.method.named_buffers())

    engine.step(batch(size=64, iteration=1), update=False)
    assert same(before, after())
    broken = batch(size=64, iteration=1)
    broken.images[0, 0, 32, 32] = math.inf
    assert engine.step(broken)[-1] == 1
    assert same(before, after())
    assert engine.step(batch(size=64, iteration=1))[-1] == 0
    assert all(not torch.equal(before[name], now) for name, now in after().items())


def test_batch_norms_are_told_of(shard, tmp_path):
    told = ready(shard, tmp_path / "a", iterations=1, **tiny()).notes
    assert any("3 levels, strides 16-8-4, channels 32-16-8" in n for n in told)
    assert any("batch norms" in n for n in told)
    told = ready(shard, tmp_path / "b", iterations=1, **tiny(backbone_args=("normed=False",))).notes
    assert not any("batch norms" in n for n in told)


def test_two_processes_train_it(shard, tmp_path):
    """With a layer that no map needs: whoever waits for its gradient waits for ever."""
    flags = ["--preset", "small-2d", "--batch", "4", "--crop", "32", "--window", "3", "--threads", "1", "--iterations"]
    flags += ["3", "--no-tensorboard", "--backbone", OWN, "--backbone-args", "normed=False", "--layout", "contiguous"]
    commands = together(2, ["pretrain", "--data", str(shard), "--run", str(tmp_path / "two"), *flags], tmp_path / "log")
    assert [c.wait() for c in commands] == [0, 0], commands[0].errors
    one = start(
        shard,
        tmp_path / "one",
        iterations=3,
        batch=4,
        window=(3,),
        lr=1e-4,
        **{**tiny(backbone_args=("normed=False",)), "groups": (4, 4, 4, 1, 1)},
    )
    assert "groups = [4, 1, 1]" in one.config.read_text()
    ours, theirs = weights(one), load_backbone(tmp_path / "two", own=OWN, tell=None).core.state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)


# --- from there to a result ------------------------------------------------------------------------------------------


def finetune(data: Path, run: Path, **more: object) -> Path:
    flags = {"preset": "small-2d", "batch": 2, "crop": (32,), "iterations": 4, "val_every": 2, "threads": 1}
    found = downstream.plan({**flags, "tensorboard": False, "data": str(data), "run": str(run), **more})
    found.on_note = lambda text: None
    found._draw = lambda iteration: None  # type: ignore[method-assign]
    return found.start().folder


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_it_is_fine_tuned(masks, tmp_path, task):
    pretrained = start(masks, tmp_path / "pre", iterations=2, **tiny()).folder
    with pytest.raises(InputError, match="one of your own"):
        finetune(masks, tmp_path / "no", init=str(pretrained), task=task)
    run = finetune(masks, tmp_path / "run", init=str(pretrained), backbone=OWN, task=task)
    with declined("one of your own"):
        load_network(run)
    network = load_network(run, own=OWN, tell=None)
    logits = network(torch.rand(2, 1, 48, 32))
    assert logits.shape == ((2, 9, 48, 32) if task == "segmentation" else (2, 2))
    scratch = finetune(masks, tmp_path / "scratch", scratch=True, backbone=OWN, task=task)
    assert load_network(scratch, own=OWN, tell=None)(torch.rand(1, 1, 32, 32)).shape[1] == logits.shape[1]
    with pytest.raises(InputError, match=r"train_modules must be -1 .* 0 to 1"):
        finetune(masks, tmp_path / "some", init=str(pretrained), backbone=OWN, task=task, train_modules=2)


def test_a_probe_leaves_the_whole_backbone_as_it_was(masks, tmp_path):
    """Its running statistics too."""
    pretrained = start(masks, tmp_path / "pre", iterations=2, **tiny()).folder
    run = finetune(masks, tmp_path / "run", init=str(pretrained), backbone=OWN, train_modules=0)
    before = load_backbone(pretrained, own=OWN, tell=None).core.state_dict()
    assert same(load_network(run, own=OWN, tell=None).backbone.core.state_dict(), before)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        (f"{CODE}:wrong", (), ("strides", "(16, 8, 4)", "(8, 4, 2)")),
        (f"{CODE}:single", (), ("list of feature maps", "a tensor of shape (1, 8, 128, 128)")),
        (f"{CODE}:stepping", (), ("halves", "(32, 16, 4)")),
        (f"{CODE}:number", (), ("torch.nn.Module", "int")),
        (f"{CODE}:nothing", (), ("imported", "nothing")),
        (f"{CODE}:failing", (), ("fails: no such thing",)),
        (f"{CODE}:lazy", (), ("lazy",)),
        ("nowhere.py:Net", (), ("no file nowhere.py",)),
        ("no.such.module:Net", (), ("imported", "no.such.module:Net")),
        (OWN, ("depth=3",), ("Small(ndim=2, in_channels=1, ...)", "depth")),
        (OWN, ("width",), ("KEY=VALUE", "width")),
        (OWN, ("width=8", "width=9"), ("width twice",)),
        ("resnet", (), ("timm:NAME", "resnet")),
        ("timm:", (), ("timm:NAME",)),
        ("unet", ("width=8",), ("U-Net", "width=8")),
    ],
)
def test_backbones_that_are_none(name, args, words):
    with declined(*words):
        choose(name, args, ndim=2, in_channels=1)


def test_maps_must_follow_the_image(shard, tmp_path):
    found = choose(f"{CODE}:Pooled", ndim=2, in_channels=1)
    assert found.strides == (16, 8, 4)
    with pytest.raises(InputError, match=r"strides \(16, 8, 4\) for .* any size, but for 32x32 they are \(4, 2, 1\)"):
        ready(shard, tmp_path / "run", iterations=1, **tiny(backbone=f"{CODE}:Pooled"))


def test_what_code_froze_stays_so(masks, tmp_path):
    """Of a network that looks at values, and imports what lies beside it."""
    looking = f"{CODE}:Looking"
    run = start(masks, tmp_path / "pre", iterations=2, **tiny(backbone=looking))
    fine = finetune(masks, tmp_path / "fine", init=str(run.folder), backbone=looking, task="classification")
    before, after = weights(run), load_network(fine, own=looking, tell=None).backbone.core.state_dict()
    assert torch.equal(before["first.0.weight"], after["first.0.weight"])
    assert not torch.equal(before["second.0.weight"], after["second.0.weight"])


def test_buffers_that_share_memory_are_written(shard, tmp_path):
    name = f"{CODE}:Overlapping"
    run = start(shard, tmp_path / "run", iterations=1, **tiny(backbone=name))
    assert load_backbone(run.folder, own=name, tell=None).core.tail.shape == (8,)


def test_the_same_tensors_of_another_network_are_refused(shard, tmp_path):
    first = start(shard, tmp_path / "first", iterations=1, **tiny(backbone_args=("drop=0.1",)))
    with declined("drop=0.1", "--partial"):
        ready(shard, tmp_path / "run", iterations=1, init=str(first.folder), **tiny())
    found = ready(shard, tmp_path / "run", iterations=1, init=str(first.folder), partial=True, **tiny())
    assert same(found.method.backbone.core.state_dict(), weights(first))


def test_code_that_has_moved_or_changed(shard, tmp_path):
    """A run is resumed with it, and says what is not as it was."""
    place = tmp_path / "code" / "own_network.py"
    place.parent.mkdir()
    place.write_bytes(CODE.read_bytes())
    run = start(shard, tmp_path / "run", iterations=1, **tiny(backbone=f"{place}:Small"))
    place.unlink()
    with declined("no file", str(place)):
        resume(run, iterations=2)
    found = resume(run, iterations=2, backbone=OWN)
    assert not any("the code of" in note for note in found.notes)
    place.write_text(CODE.read_text() + "# changed\n")
    found = resume(run, iterations=2, backbone=f"{place}:Small")
    assert any("the code of the backbone was" in note for note in found.notes)
    with pytest.raises(InputError, match="backbone cannot change"):
        resume(run, iterations=2, backbone="unet")


def test_all_processes_validate_one_network(shard, tmp_path):
    """The first one's, statistics and all: the others have kept those of their own samples."""
    spy = (
        """
from coverfast.training.pretrain import Pretraining
validate = Pretraining._validate
def told(self, iteration):
    found = validate(self, iteration)
    total = sum(float(b.double().sum()) for b in self.method.buffers())
    total += sum(float(b.double().sum()) for b in self.engine.ema.buffers())
    open(f"{here}/{{self.world.rank}}-{{iteration}}", "w").write(repr(total))
    return found
Pretraining._validate = told
""".replace("{here}", str(tmp_path))
        .replace("{{", "{")
        .replace("}}", "}")
    )
    flags = ["--preset", "small-2d", "--batch", "4", "--crop", "32", "--window", "3", "--threads", "1", "--iterations"]
    flags += ["2", "--val-every", "1", "--ema", "0.5", "--val", str(shard), "--no-tensorboard", "--backbone", OWN]
    command = ["pretrain", "--data", str(shard), "--run", str(tmp_path / "two"), *flags]
    commands = together(2, command, tmp_path / "log", spy)
    assert [c.wait() for c in commands] == [0, 0], commands[0].errors
    for iteration in (1, 2):
        one, two = ((tmp_path / f"{rank}-{iteration}").read_text() for rank in range(2))
        assert one == two


def test_settings_that_are_the_u_nets_alone(shard, tmp_path):
    for flags, words in (
        ({"recompute": True}, "recompute is for the U-Net alone"),
        ({"fsdp": True}, "fsdp shards the U-Net alone"),
        ({"channels": (8, 8, 8)}, "channels are those of the U-Net"),
        ({"groups": (1, 1)}, r"groups must be 3, .* got \(1, 1\)"),
        ({"crop": (40,)}, "crop must have a size divisible by 16"),
        ({"backbone": "unet", "backbone_args": ("width=3",)}, "backbone_args need a backbone other than the U-Net"),
    ):
        with pytest.raises(InputError, match=words):
            ready(shard, tmp_path / "run", iterations=1, **{**tiny(), **flags})
    assert not (tmp_path / "run").exists()


def test_a_file_decides_no_import(shard, tmp_path):
    """Its metadata name code; only who loads it can say that this code may run."""
    run = start(shard, tmp_path / "run", iterations=1, **tiny())
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    content = run.backbone.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["backbone"])
    header["__metadata__"]["backbone"] = json.dumps({**about, "name": f"{trap}:Net"})
    text = json.dumps(header).encode()
    run.backbone.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    for attempt in (
        lambda: load_backbone(run.backbone),
        lambda: finetune(shard, tmp_path / "f", init=str(run.backbone)),
    ):
        with pytest.raises(InputError, match=r"your own|label maps"):
            attempt()
    assert not (tmp_path / "sprung").exists()
    loaded = load_backbone(run.backbone, own=OWN, tell=None)  # who says which code it is decides
    assert loaded.strides == (16, 8, 4)


def test_the_command_refuses_in_one_sentence(shard, tmp_path):
    common = ["pretrain", "--data", str(shard), "--run", str(tmp_path / "run"), "--preset", "small-2d", "--crop", "32"]
    refused(cli(*common, "--backbone", f"{CODE}:number"), "torch.nn.Module")
    refused(cli(*common, "--backbone", "densenet"), "timm:NAME")
    assert not (tmp_path / "run").exists()


def test_a_study_compares_it_with_itself_from_scratch(tmp_path):
    pytest.importorskip("sklearn")
    config = tmp_path / "study.toml"
    common = "threads = 1\nbatch = 2\n"
    own = f'[pretrain]\nbackbone = "{OWN}"\ngroups = [2, 1, 1]\nwindow = 3\ntensorboard = false\n{common}'
    config.write_text(f"{own}[finetune]\n{common}[probe]\n{common}")
    out = tmp_path / "study"
    sizes = ["--images", "3", "--validation", "1", "--test", "3", "--size", "64", "--crop", "32", "--cases", "2"]
    lengths = ["--seeds", "1", "--pretrain-iterations", "4", "--iterations", "4", "--probe-iterations", "4"]
    done = cli(
        "study", "transfer", "--preset", "small-2d", "--config", str(config), "--out", str(out), *sizes, *lengths
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((out / "transfer.json").read_text())["arms"]) == 4
    configs = [p.read_text() for p in (out / "runs").glob("*/config.toml")]
    assert len(configs) == 5
    assert all(f'backbone = "{OWN}"' in text for text in configs)
