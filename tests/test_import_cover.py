"""Checkpoints in the layout of the authors' training script, against a forward written from their own keys."""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import json
import os
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from authors_checkpoint import CHANNELS, GROUPS, HEAD, checkpoint
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import assert_near, randn, refused
from typer.testing import CliRunner

from coverfast import InputError, mov
from coverfast.backbones import load_backbone, load_pyramid, read_backbone
from coverfast.backbones.import_cover import import_cover
from coverfast.cli.main import app, main


def forward(state, x):
    """Features, coarse to fine, from the checkpoint's own keys (SPEC 7)."""
    state = {name: value.double() for name, value in state.items()}
    n = x.ndim - 2
    conv, pool = (F.conv2d, F.max_pool2d) if n == 2 else (F.conv3d, F.max_pool3d)

    def double(prefix, x):
        for place in (0, 3):
            name = f"{prefix}.double_conv.{place}"
            x = conv(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
            name = f"{prefix}.double_conv.{place + 1}"
            x = F.group_norm(x, x.shape[1] // 8, state[f"{name}.weight"], state[f"{name}.bias"])
            x = F.leaky_relu(x, 0.2)
        return x

    skips = [double("backbone.inc", x)]
    while f"backbone.down{len(skips)}.maxpool_conv.1.double_conv.0.weight" in state:
        skips.append(double(f"backbone.down{len(skips)}.maxpool_conv.1", pool(skips[-1], 2)))
    features = [skips[-1]]
    for i, skip in enumerate(reversed(skips[:-1]), start=1):
        up = F.interpolate(features[-1], size=skip.shape[2:], mode="bilinear" if n == 2 else "trilinear")
        features.append(double(f"backbone.up{i}.conv", torch.cat([skip, up], 1)))
    return features


def project(state, level, x):
    """A projection of theirs: 1x1 convolution, then the norm over all channels."""
    weight, bias, gain, shift = (
        state[f"proj.{level}.{name}"].double() for name in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    )
    return F.group_norm((F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias), 1, gain, shift)


def interleaved_mov(q, k, window, groups):
    """SPEC 1 with interleaved groups, a loop over the offsets."""
    q, k = (rearrange(x, "b (d j) ... -> b j d ...", j=groups) for x in (q, k))
    n, radius = q.ndim - 3, window // 2
    at = torch.stack(torch.meshgrid(*[torch.arange(s) for s in q.shape[3:]], indexing="ij"))
    size = torch.tensor(q.shape[3:]).view(n, *[1] * n)
    padded = F.pad(k, [radius] * 2 * n)
    scores, offsets = [], list(itertools.product(range(-radius, radius + 1), repeat=n))
    for offset in offsets:
        there = at + torch.tensor(offset).view(n, *[1] * n)
        outside = ((there < 0) | (there >= size)).any(0)
        cut = (slice(None),) * 3 + tuple(
            slice(radius + o, radius + o + s) for o, s in zip(offset, q.shape[3:], strict=True)
        )
        scores.append(((q * padded[cut]).sum(2) * q.shape[2] ** -0.5).masked_fill(outside, -torch.inf))
    weights = torch.stack(scores, -1).softmax(-1)
    return (weights @ torch.tensor(offsets).double()).mean(1).movedim(-1, 1)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def command(*arguments):
    return CliRunner().invoke(app, ["import-cover", *map(str, arguments)])


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ndim", "size", "channels", "groups", "in_channels"),
    [
        (2, (24, 32), CHANNELS, GROUPS, 1),
        (2, (32, 16), (8, 8, 16, 24, 40, 16, 24, 8, 16), (4, 4, 4, 1, 1), 3),
        (3, (8, 4, 12), CHANNELS, GROUPS, 1),
        (3, (4, 6, 2), (16, 8, 24), (2, 5), 2),
    ],
)
def test_features_projections_and_mov_are_theirs(ndim, size, channels, groups, in_channels, tmp_path):
    state = checkpoint(ndim, channels, groups, in_channels=in_channels)
    x = randn(2, in_channels, *size)
    found = import_cover(saved(tmp_path / "theirs.pth", {"state_dict": state}))
    backbone, pyramid = found.backbone.double(), found.pyramid.double()
    assert not backbone.training
    assert not pyramid.training
    assert backbone.channels == channels
    assert pyramid.groups == groups
    ours, theirs = backbone(x), forward(state, x)
    assert len(ours) == len(theirs) == len(groups)
    for level, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_near(mine, other)
        a, b = pyramid.projections[level](mine), project(state, level, other)
        assert_near(rearrange(a, "b (j d) ... -> b j d ...", d=HEAD), rearrange(b, "b (d j) ... -> b j d ...", d=HEAD))
        assert groups[level] == 1 or not torch.equal(a, b)
        matched = mov(a[:1], a[1:], window=5, groups=groups[level])
        assert_near(matched, interleaved_mov(b[:1], b[1:], 5, groups[level]))


@given(head=st.integers(1, 5), groups=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_any_head_and_groups(head, groups, tmp_path_factory):
    state = checkpoint(2, (8, 8, 8), groups, head)
    path = saved(tmp_path_factory.mktemp("any") / "theirs.pth", state)
    pyramid = import_cover(path, head_dim=head).pyramid
    assert (pyramid.groups, pyramid.head_dim) == (groups, head)
    for level, projection in enumerate(pyramid.projections):
        for ours, theirs in ((projection.conv, "proj"), (projection.norm, "norm")):
            for kind in ("weight", "bias"):
                there = state[f"proj.{level}.{theirs}.{kind}"]
                assert torch.equal(getattr(ours, kind).data, rearrange(there, "(d j) ... -> (j d) ...", d=head))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_wrappings_are_one(prefix, wrapped, ordered, tmp_path):
    state = checkpoint()
    kind = collections.OrderedDict if ordered else dict
    content = kind((prefix + name, value) for name, value in state.items())
    if wrapped:
        content = {"state_dict": content, "epoch": 7, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}}
    found = import_cover(saved(tmp_path / "theirs.pth", content))
    assert len(found.report.matched) == len(state) - 1
    plain = import_cover(saved(tmp_path / "plain.pth", state))
    for mine, other in ((found.backbone, plain.backbone), (found.pyramid, plain.pyramid)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
    said = " / ".join(found.notes)
    assert ("ignored beside state_dict: epoch, optimizer" in said) == wrapped
    assert "dropped mov.grid" in said


def test_random_numbers_are_left_alone(tmp_path):
    path = saved(tmp_path / "theirs.pth", checkpoint())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    import_cover(path)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(("ndim", "default"), [(2, 7), (3, 5)])
def test_the_window_is_what_the_grid_tells(ndim, default, tmp_path):
    def window(grid):
        state = checkpoint(ndim, (8, 8, 8), (1, 1))
        state.pop("mov.grid")
        found = import_cover(saved(tmp_path / "theirs.pth", state | grid))
        assert set(found.pyramid.windows) == {(found.pyramid.windows[0][0],) * ndim}
        return found.pyramid.windows[0][0], found.notes[-1]

    for size in (3, 5, 9):
        for shape in ((ndim, *[size] * ndim), (1, ndim, size**ndim), (size**ndim, ndim)):
            found, said = window({"mov.grid": torch.zeros(shape)})
            assert found == size
            assert f"dropped mov.grid, the {size**ndim} offsets of a window of {size}" in said
    for shape in ((ndim, *[4] * ndim), (17,), (ndim,), (0,), ()):
        found, said = window({"mov.grid": torch.zeros(shape)})
        assert found == default
        assert f"window {default}, the default here: dropped mov.grid, whose shape {shape} tells none" in said
    found, said = window({})
    assert found == default
    assert "there is no mov.grid" in said


def test_half_precision_is_converted_and_told(tmp_path):
    state = {name: value.half() for name, value in checkpoint().items()}
    found = import_cover(saved(tmp_path / "theirs.pth", state))
    assert f"{len(state) - 1} tensors converted from float16 to float32" in found.notes
    assert found.backbone.stem[0].weight.dtype == torch.float32
    assert torch.equal(found.backbone.stem[0].weight.half(), state["backbone.inc.double_conv.0.weight"])


# --- damage --------------------------------------------------------------------------------------------------------


def changed(**tensors):
    """A change of a checkpoint: names with _ for . and None for none."""

    def change(state):
        for name, value in tensors.items():
            place = next((n for n in state if n.replace(".", "_") == name), name)
            state.pop(place, None)
            if value is not None:
                state[place] = value
        return state

    return change


def without(pattern):
    return lambda state: {name: value for name, value in state.items() if not re.match(pattern, name)}


def prefixed(prefix, pattern=""):
    return lambda state: {prefix * bool(re.match(pattern, name)) + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(backbone_inc_double_conv_0_weight=None), ["1 missing (backbone.inc.double_conv.0.weight)", "0 resh"]),
        (changed(backbone_up2_conv_double_conv_4_bias=None), ["1 missing (backbone.up2.conv.double_conv.4.bias)"]),
        (changed(proj_1_norm_bias=None), ["51 matched", "1 missing (proj.1.norm.bias), 0 unexpected, 0 reshaped"]),
        (without("proj"), ["40 matched, 12 missing (proj.0.proj.weight, proj.0.proj.bias", "and 9 more"]),
        (without("backbone"), ["8 matched, 24 missing (backbone.inc.double_conv.0.weight", "4 unexpected"]),
        (without(r"backbone\.down1"), ["44 matched, 8 missing (backbone.down1.maxpool_conv.1.double_conv.0", "0 resh"]),
        (without(r"backbone\.down2|backbone\.up2"), ["missing"]),
        (changed(**{"backbone.outc.weight": torch.zeros(1)}), ["1 unexpected (backbone.outc.weight)", "52 matched"]),
        (changed(**{"backbone.up1.up.weight": torch.zeros(24, 24, 2, 2)}), ["1 unexpected (backbone.up1.up.weight)"]),
        (changed(**{"proj.3.proj.bias": torch.zeros(8)}), ["1 unexpected (proj.3.proj.bias)"]),
        (changed(**{"mov.offsets": torch.zeros(2, 25)}), ["1 unexpected (mov.offsets)"]),
        (prefixed("module.", "proj"), ["12 missing", "12 unexpected (module.proj.0.proj.weight"]),
        (prefixed("model."), ["unexpected (model.backbone.inc"]),
        (
            changed(backbone_inc_double_conv_3_weight=torch.zeros(8, 4, 3, 3)),
            ["1 reshaped (backbone.inc.double_conv.3.weight (8, 4, 3, 3) for (8, 8, 3, 3))", "0 missing"],
        ),
        (changed(backbone_inc_double_conv_0_bias=torch.zeros(9)), ["0.bias (9,) for (8,))", "1 reshaped"]),
        (changed(backbone_inc_double_conv_0_weight=torch.zeros(8, 1, 5, 5)), ["(8, 1, 5, 5) for (8, ?, 3, 3))"]),
        (changed(backbone_down2_maxpool_conv_1_double_conv_0_weight=torch.zeros(24, 16, 3, 3, 3)), ["1 reshaped"]),
        (changed(proj_2_proj_weight=torch.zeros(8, 16, 1, 1)), ["(8, 16, 1, 1) for (8, 8, 1, 1))", "1 reshaped"]),
        (changed(proj_2_proj_weight=torch.tensor(1.0)), ["1 reshaped (proj.2.proj.weight () for (8, 8, 1, 1))"]),
        (changed(proj_0_proj_weight=torch.zeros(0, 24, 1, 1)), ["1 reshaped"]),
        (changed(backbone_inc_double_conv_0_weight=torch.zeros(8, 0, 3, 3)), ["in_channels must be at least 1, got 0"]),
        (changed(proj_1_proj_bias=torch.full((24,), torch.nan)), ["finite", "proj.1.proj.bias"]),
        (changed(proj_1_proj_bias=torch.zeros(24, dtype=torch.int64)), ["real numbers", "int64"]),
        (changed(proj_1_proj_bias=torch.zeros(24, dtype=torch.complex64)), ["real numbers", "complex64"]),
        (changed(proj_1_proj_bias=torch.zeros(24).to_sparse()), ["plain tensor for proj.1.proj.bias", "sparse"]),
        (changed(proj_1_proj_bias=[0.0] * 24), ["plain tensor for proj.1.proj.bias, got list"]),
        (lambda state: {7: state}, ["must hold a state dict", "got a dict of 7"]),
        (lambda state: {}, ["must hold a state dict", "a dict of nothing"]),
        (lambda state: [state], ["must hold a state dict", "got list"]),
        (lambda state: {"state_dict": {}}, ["must hold a state dict", "a dict of nothing"]),
        (lambda state: {"model": state, "epoch": 3}, ["plain tensor for model, got a dict of backbone.inc"]),
        (lambda state: {"fc.weight": torch.zeros(3, 3)}, ["0 matched", "1 unexpected (fc.weight)"]),
        (lambda state: checkpoint(channels=(8, 12, 8), groups=(1, 1)), ["multiples of 8"]),
        (lambda state: checkpoint(head=6), ["--head-dim", "whole groups of 8 channels", "[24, 18, 6]"]),
    ],
)
def test_what_does_not_fit_is_named_and_writes_nothing(change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, out = saved("theirs.pth", change(checkpoint())), "backbone.safetensors"
    with pytest.raises(InputError) as caught:
        import_cover(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert isinstance(command(path, "--out", out).exception, InputError)
    assert [p.name for p in tmp_path.iterdir()] == [path]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False, None])
@pytest.mark.parametrize("beside", [True, False])
def test_nothing_is_executed(zipped, beside, tmp_path):
    path, mark = tmp_path / "bomb.pth", tmp_path / "mark"
    content = {"state_dict": checkpoint(), "args": Bomb(mark)} if beside else Bomb(mark)
    if zipped is None:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        saved(path, content, _use_new_zipfile_serialization=zipped)
    with refused("bomb.pth"):
        import_cover(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it would have gone off


def test_other_objects_are_named(tmp_path):
    path = saved(tmp_path / "args.pth", {"state_dict": checkpoint(), "args": argparse.Namespace(lr=1)})
    with refused("args.pth", "argparse.Namespace", "save its state_dict by itself"):
        import_cover(path)


def test_damaged_files(tmp_path):
    memory = io.BytesIO()
    torch.save({"state_dict": checkpoint()}, memory)
    whole, path = memory.getvalue(), tmp_path / "theirs.pth"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", b"hello world", whole[:40], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(content)
        with refused("theirs.pth", "checkpoint"):
            import_cover(path)
    path.write_bytes(whole)
    import_cover(path)
    with refused("there is no", "absent.pth"):
        import_cover(tmp_path / "absent.pth")
    with refused("there is no", str(tmp_path)):
        import_cover(tmp_path)
    with refused("head_dim must be at least 1, got 0"):
        import_cover(path, head_dim=0)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
def test_command_writes_a_backbone_with_its_pyramid(ndim, tmp_path):
    state = checkpoint(ndim)
    path = saved(tmp_path / "theirs.pth", {"state_dict": state, "epoch": 3})
    out = tmp_path / "backbone.safetensors"
    result = command(path, "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"{path}: 52 matched, 0 missing, 0 unexpected, 0 reshaped"
    assert lines[1:3] == [
        "ignored beside state_dict: epoch",
        f"dropped mov.grid, the {5**ndim} offsets of a window of 5, which is made from its size here",
    ]
    assert lines[3] == f"{out}: {ndim}D U-Net for 1 channel(s), 8-16-24-16-8; groups 4, 3, 1 of 8 channels"
    x, said = randn(2, 1, *[8] * ndim, dtype=torch.float32), []
    features = load_backbone(out, tell=said.append)(x)
    assert "40 matched, 0 missing" in said[0]
    for ours, theirs in zip(features, forward(state, x.double()), strict=True):
        assert_near(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    pyramid = load_pyramid(out, tell=None)
    assert pyramid.windows == [(5,) * ndim] * 3
    assert pyramid([f[:1] for f in features], [f[1:] for f in features]).shape == (1, ndim, *[8] * ndim)
    metadata = read_backbone(out)[1]
    assert json.loads(metadata["config"])["source"] == "import-cover"
    assert json.loads(metadata["preprocessing"]) == {}
    assert {n for n in load_file(out) if n.startswith("pyramid.")} == {f"pyramid.{n}" for n in pyramid.state_dict()}


def test_an_existing_file_is_not_touched(tmp_path):
    path, out = saved(tmp_path / "theirs.pth", checkpoint()), tmp_path / "backbone.safetensors"
    out.write_bytes(b"mine")
    for place in (out, path, tmp_path):
        result = command(path, "--out", place)
        assert "must be a new file" in str(result.exception)
    assert out.read_bytes() == b"mine"


def test_refusals_end_with_code_2(tmp_path, monkeypatch, capsys):
    for content, out, words in (
        ({"fc.weight": torch.zeros(1)}, tmp_path / "new.safetensors", "0 matched, 32 missing"),
        (checkpoint(), tmp_path / "no" / "new.safetensors", "out must lie in a folder that is there"),
    ):
        path = saved(tmp_path / "theirs.pth", content)
        monkeypatch.setattr("sys.argv", ["coverfast", "import-cover", str(path), "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert words in said.err
        assert said.out == ""
        assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs.pth"]
