"""torch.compile without graph breaks, and a package that loads nothing it does not need."""

import pytest
import torch
from strategies import assert_near, gradients, leaves, randn, run_python

import coverfast
from coverfast import (
    AffineDVF,
    UNet,
    VectorPyramid,
    affine_dvf,
    compose,
    consistency_loss,
    inside_mask,
    mov,
    upsample_dvf,
    vector_loss,
    warp,
)
from coverfast.ops.fuse import fuse_affine
from coverfast.ops.losses import field_errors
from coverfast.ops.warp import resample, warp_up


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def same_compiled(function, *tensors, backend="aot_eager", atol=1e-10, dynamic=None):
    """Values and gradients, eager against one graph."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)):
        inputs = leaves(*tensors)
        out = run(*inputs)
        results.append([out.detach(), *gradients(out, inputs)])
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert_near(compiled, eager, atol=atol, rtol=atol)


def ops(size):
    """Each op as a function of tensors alone, with tensors to call it on."""
    n, half = len(size), [s // 2 for s in size]
    a, b = randn(2, 4, *size), randn(2, 4, *size, seed=1)
    dvf, coarse = randn(2, n, *size, seed=2), randn(2, n, *half, seed=3)
    theta = torch.cat([torch.eye(n).double() + 0.1 * randn(2, n, n, seed=4), randn(2, n, 1, seed=5)], 2)
    return {
        "mov": (lambda q, k: mov(q, k, window=3, groups=2), a, b),
        "warp": (warp, a, dvf),
        "border": (lambda x, d: warp(x, d, padding="border"), a, dvf),
        "nearest": (lambda x: warp(x, dvf, mode="nearest"), a),
        "compose": (compose, dvf, coarse),
        "fuse_affine": (fuse_affine, dvf, theta),
        "upsample_dvf": (lambda c: upsample_dvf(c, size), coarse),
        "vector_loss": (lambda p: vector_loss(p, dvf, "inside"), dvf.flip(0)),
        "consistency_loss": (lambda a, b: consistency_loss(a, b, dvf, inside_mask(dvf)), a, b),
        "affine_dvf": (lambda t: affine_dvf(t, size, full_size=20, origin=3), theta),
        "affine target": (lambda p, t: vector_loss(p, AffineDVF(t, size), "inside"), dvf, theta),
    }


@pytest.mark.parametrize("op", list(ops((2, 2))))
def test_one_graph(op):
    for size in ((6, 4), (4, 2, 6)):
        function, *tensors = ops(size)[op]
        same_compiled(function, *tensors)


@pytest.mark.parametrize("op", ["mov", "warp", "compose", "fuse_affine", "consistency_loss"])
def test_one_graph_of_any_size(op):
    function, *tensors = ops((6, 8))[op]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    if op == "consistency_loss":  # its field is a constant of the graph
        return same_compiled(function, *tensors, dynamic=True)
    for batch in (2, 1):
        assert_near(compiled(*(t[:batch] for t in tensors)), function(*(t[:batch] for t in tensors)))


def pyramid_and_maps(ndim):
    torch.manual_seed(0)
    pyramid = VectorPyramid(ndim, (6, 5), (2, 1), 3, 3).double()
    coarse = (3, 2, 2)[:ndim]
    maps = [
        randn(2, c, *(s * 2**level for s in coarse), seed=10 * view + level)
        for view in range(2)
        for level, c in enumerate(pyramid.channels)
    ]
    return pyramid, maps


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_pyramid_is_one_graph(ndim):
    pyramid, maps = pyramid_and_maps(ndim)

    def run(*maps):
        return pyramid(maps[:2], maps[2:])

    same_compiled(run, *maps, atol=1e-9)
    slopes = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        pyramid.zero_grad()
        function(*maps).square().sum().backward()
        slopes.append([p.grad for p in pyramid.parameters()])
    for compiled, eager in zip(slopes[1], slopes[0], strict=True):
        assert_near(compiled, eager, atol=1e-8, rtol=1e-8)


def test_the_unet_is_one_graph():
    unet = UNet(2, 1, (8, 16, 8)).double()
    same_compiled(lambda x: unet(x)[-1], randn(2, 1, 8, 6))


@pytest.mark.slow
@pytest.mark.parametrize("ndim", [2, 3])
def test_the_pyramid_under_inductor(ndim):
    pyramid, maps = pyramid_and_maps(ndim)
    same_compiled(lambda *m: pyramid(m[:2], m[2:]), *maps, backend="inductor", atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["mov", "warp", "compose", "fuse_affine", "consistency_loss", "affine target"])
def test_ops_under_inductor(op):
    function, *tensors = ops((6, 4))[op]
    same_compiled(function, *tensors, backend="inductor")


def test_export():
    class Ops(torch.nn.Module):
        """The ops that a network would hold."""

        def forward(self, a, b):
            return warp(a, mov(b, a, window=3))

    a, b = randn(1, 4, 5, 6), randn(1, 4, 5, 6, seed=1)
    exported = torch.export.export(Ops(), (a, b)).module()
    assert_near(exported(a, b), Ops()(a, b))


def test_the_import_is_cheap():
    loaded = run_python("import sys, coverfast; print(*sys.modules)").split()
    assert "coverfast" in loaded
    for heavy in ("torch", "triton", "numpy", "h5py", "einops", "matplotlib"):
        assert heavy not in loaded


def test_every_public_name_is_there():
    code = "import coverfast\nfor name in coverfast.__all__: getattr(coverfast, name)\nprint(len(dir(coverfast)))"
    assert int(run_python(code)) >= 18
    assert not hasattr(coverfast, "no_such")


_FIRST_USE = """
import torch, coverfast
run = torch.compile(lambda q, k: coverfast.mov(q, k, window=3), fullgraph=True, backend="aot_eager")
q, k = torch.randn(1, 2, 4, 5), torch.randn(1, 2, 4, 5)
out = run(q, k)
assert torch.equal(out, coverfast.mov(q, k, window=3))
"""


def test_first_use_inside_a_compiled_function():
    run_python(_FIRST_USE)


def forms(size):
    """Each form of field that `warp` and the losses take, as a function of tensors alone."""
    n, half = len(size), [s // 2 for s in size]
    x, dvf, coarse = randn(2, 4, *size), randn(2, n, *size, seed=2), randn(2, n, *half, seed=3)
    theta = torch.cat([torch.eye(n).double() + 0.1 * randn(2, n, n, seed=4), randn(2, n, 1, seed=5)], 2)
    crop = (*size[:-1], size[-1] - 1)
    return {
        "affine": (lambda x: warp(x, AffineDVF(theta, size), padding="border"), x),
        "affine with a gradient": (lambda x, t: warp(x, AffineDVF(t, size)), x, theta),
        "crop": (lambda x: resample(x, AffineDVF(theta, crop, full_size=size, origin=1)), x),
        "warp_up": (warp_up, x, coarse),
        "field_errors": (lambda p: torch.stack(field_errors(p, AffineDVF(theta, size), "inside")), dvf),
        "affine consistency": (lambda a, b: consistency_loss(a, b, AffineDVF(theta, size), "inside"), x, x.flip(0)),
        "consistency with a gradient": (lambda a, t: consistency_loss(a, x, AffineDVF(t, size)), x.flip(0), theta),
    }


#: Compiled before a release only: each takes seconds, and the rest has parts of them.
_LATER = ("affine with a gradient", "affine consistency")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form in _LATER)) for form in forms((2, 2))]
)
def test_one_graph_of_every_form(form):
    for size in ((6, 4), (4, 2, 6)):
        function, *tensors = forms(size)[form]
        same_compiled(function, *tensors)
