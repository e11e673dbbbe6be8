"""Mixture of vectors (MoV): where in view a is what view b shows here, by soft matching in a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import inf, prod

import torch
from torch import Tensor

from coverfast import reference
from coverfast.checks import InputError, check_map, check_same, check_window
from coverfast.layout import new_like
from coverfast.ops.dispatch import choose

Offset = tuple[int, ...]


def mov(
    q: Tensor,
    k: Tensor,
    *,
    window: int | Sequence[int],
    groups: int = 1,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Displacement of every query pixel by soft matching with the keys in a window around it (COVER Eq. 7).

    For pixel `p`, group `j` and offset `o` of the window box: scores `scale * <q_j(p), k_j(p + o)>` over the offsets
    inside the grid, softmax, the mean offset under these weights, and the mean over groups. Offsets out of the grid
    have weight exactly 0.

    Args:
        q: queries `(B, C, *S)`, features of view b (the grid that is written); float16, bfloat16, float32, float64.
        k: keys `(B, C, *S)`, features of view a; same shape, dtype and device.
        window: odd width in pixels, an int or one per axis; may exceed the grid.
        groups: J contiguous groups of `C / J` channels, each matched on its own.
        scale: factor on the dot products; default `(C / J) ** -0.5`.
        impl: "auto", "triton", "torch" or "reference". The Triton kernels read maps whose channels are contiguous
            (channels-last) in place, sliced or not; any other is copied to channels-last first, once a direction.

    Returns:
        DVF `(B, n, *S)` in pixels, float32 (float64 for float64 input), no component beyond its window radius.

    Raises:
        InputError: on a shape, dtype, device or window that does not fit. Second-order gradients raise.
    """
    ndim = check_map("q", q)
    check_map("k", k)
    check_same("k", k, "q", q, "shape", "dtype", "device")
    sizes = check_window(window, ndim)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or q.shape[1] % groups:
        raise InputError(f"groups must divide the {int(q.shape[1])} channels of q, got {groups!r}")
    if scale is None:
        scale = (q.shape[1] // groups) ** -0.5
    if not isinstance(scale, (int, float)) or not -inf < scale < inf:
        raise InputError(f"scale must be a finite number, got {scale!r}")
    scale = float(scale)
    chosen = choose("mov", impl, q)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.mov(q, k, sizes, groups, scale)
    return torch.ops.coverfast.mov_forward(q, k, sizes, groups, scale, chosen)[0]


# --- operators -------------------------------------------------------------------------------------------------
# Opaque to torch.compile: one graph node a direction instead of one a tap. The forward saves, beside its output,
# the log-sum-exp (natural from torch, in base 2 from Triton: each for its own backward) and, for several groups, their
# separate vectors (an empty tensor for one group).


@torch.library.custom_op(
    "coverfast::mov_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, int[] window, int groups, float scale, str impl) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, window: Sequence[int], groups: int, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _new_outputs(q, groups)
    with torch.autocast(q.device.type, enabled=False):
        if impl == "triton":
            from coverfast.kernels import mov as kernels

            kernels.forward_launch(q, k, *outputs, window, groups, scale).run()
        else:
            _torch_forward(q, k, *outputs, window, groups, scale)
    return outputs


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, window: Sequence[int], groups: int, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(q, groups)


@torch.library.custom_op(
    "coverfast::mov_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor out, Tensor lse, Tensor vectors, int[] window, int groups, "
    "float scale, str impl) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    vectors: Tensor,
    window: Sequence[int],
    groups: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    gradients = new_like(q), new_like(k)
    with torch.autocast(q.device.type, enabled=False):
        if impl == "triton":
            from coverfast.kernels import mov as kernels

            for launch in kernels.backward_launches(grad, q, k, out, lse, vectors, *gradients, window, groups, scale):
                launch.run()
        else:
            _torch_backward(grad, q, k, out, lse, vectors, *gradients, window, groups, scale)
    return gradients


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    vectors: Tensor,
    window: Sequence[int],
    groups: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return new_like(q), new_like(k)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, ctx.window, ctx.groups, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, *output)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # no zeros for these two


def _autograd(ctx, grad, _grad_lse, _grad_vectors):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 6
    saved = ctx.saved_tensors
    dq, dk = torch.ops.coverfast.mov_backward(grad, *saved, ctx.window, ctx.groups, ctx.scale, ctx.impl)
    return dq, dk, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _new_outputs(q: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, size, n = q.shape[0], q.shape[2:], q.ndim - 2
    dtype = accumulation_dtype(q)
    out = q.new_empty((batch, n, *size), dtype=dtype)
    lse = q.new_empty((batch, groups, *size), dtype=dtype)
    vectors = q.new_empty((batch, groups, n, *size) if groups > 1 else (0,), dtype=dtype)
    return out, lse, vectors


_gradient_like = new_like


# --- the lean torch formulation --------------------------------------------------------------------------------
# The grid is cut into blocks of rows and the window into runs of taps, so that the scores of one block and run stay
# in cache; the softmax is carried from run to run. A tap reads shifted views and touches just the pixels whose
# neighbour at that offset is inside the grid; all other scores of the block stay minus infinity.

_SCORES_PER_BLOCK = 2**22
#: Pixels and groups that a tap serves at least, where the grid has them, by shorter runs of taps if need be: in a wide
#: window few of them would leave most of the time to Python.
_LANES_PER_TAP = 2**15


def _blocks(batch: int, rows: int, row_scores: int) -> Iterator[tuple[slice, int, int]]:
    """Cut (batch, first spatial axis) so that one block holds about `_SCORES_PER_BLOCK` scores."""
    items = max(1, min(batch, _SCORES_PER_BLOCK // max(1, row_scores * rows)))
    step = max(1, min(rows, _SCORES_PER_BLOCK // max(1, row_scores * items)))
    for b in range(0, batch, items):
        for r in range(0, rows, step):
            yield slice(b, min(b + items, batch)), r, min(r + step, rows)


def _tap_runs(window: Sequence[int], size: Sequence[int], limit: int) -> list[list[Offset]]:
    """Offsets of the window that reach any pixel of the grid, in runs of at most `limit`."""
    reach = [min((w - 1) // 2, s - 1) for w, s in zip(window, size, strict=True)]
    offsets = list(product(*(range(-r, r + 1) for r in reach)))
    return [offsets[i : i + limit] for i in range(0, len(offsets), limit)]


def _boxes(offset: Offset, size: Sequence[int], first: int, last: int) -> tuple[tuple, tuple, tuple] | None:
    """For one tap and the rows `first:last`: the pixels it serves (in the block, in the grid) and their neighbours."""
    low, high = max(first, -offset[0]), min(last, size[0] - offset[0])
    if low >= high:
        return None
    rest = [slice(max(0, -o), min(s, s - o)) for o, s in zip(offset[1:], size[1:], strict=True)]
    moved = [slice(b.start + o, b.stop + o) for b, o in zip(rest, offset[1:], strict=True)]
    in_block = (..., slice(low - first, high - first), *rest)
    return in_block, (..., slice(low, high), *rest), (..., slice(low + offset[0], high + offset[0]), *moved)


class _Scores:
    """Scores of one block of pixels at a run of taps, in memory that all blocks share."""

    def __init__(self, q: Tensor, taps: int) -> None:
        self.scores, self.products = q.new_empty(0), q.new_empty(0)
        self.taps = taps

    def fill(self, q: Tensor, k: Tensor, run: list[Offset], size: Sequence[int], first: int, last: int) -> Tensor:
        """`(T, b, J, rows, ...)`: dot products of the scaled queries of the block with the keys at each offset."""
        shape = (q.shape[0], q.shape[1], *q.shape[3:])
        count = len(run) * prod(shape)
        if self.scores.numel() < count:
            self.scores = q.new_empty(max(count, self.taps * prod(shape)))
            self.products = q.new_empty(q.numel())
        scores = self.scores[:count].view(len(run), *shape).fill_(float("-inf"))
        for tap, offset in zip(scores, run, strict=True):
            if (boxes := _boxes(offset, size, first, last)) is None:
                continue
            in_block, _, neighbours = boxes
            queries, keys = q[in_block], k[neighbours]
            products = self.products[: queries.numel()].view(queries.shape)
            torch.mul(queries, keys, out=products)
            torch.sum(products, 2, out=tap[in_block])
        return scores


def _grouped(x: Tensor, groups: int) -> Tensor:
    # Plane by plane: rows of channels take half as long again, and a copy is nothing beside a window of products.
    return x.to(accumulation_dtype(x)).contiguous().unflatten(1, (groups, -1))


def _template(run: list[Offset], like: Tensor) -> Tensor:
    return torch.tensor(run, dtype=like.dtype, device=like.device)


def _plan(q: Tensor, window: Sequence[int], groups: int) -> tuple[list[list[Offset]], int, int]:
    """Runs of taps, the most taps in a run, and the scores that one row of one image needs for a run."""
    row = groups * prod(q.shape[3:])
    pixels = max(row, min(row * q.shape[2], _LANES_PER_TAP), 1)
    runs = _tap_runs(window, q.shape[2:], max(1, _SCORES_PER_BLOCK // pixels))
    return runs, len(runs[0]), row * len(runs[0])


def _torch_forward(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    vectors: Tensor,
    window: Sequence[int],
    groups: int,
    scale: float,
) -> None:
    size, n = q.shape[2:], q.ndim - 2
    runs, taps, row_scores = _plan(q, window, groups)
    templates = [_template(run, out) for run in runs]
    queries, keys = _grouped(q, groups), _grouped(k, groups)
    memory = _Scores(keys, taps)
    for items, first, last in _blocks(q.shape[0], size[0], row_scores):
        block = queries[items, :, :, first:last] * scale
        pixels = (block.shape[0], groups, *block.shape[3:])
        # The smallest finite start, not minus infinity: a block whose first taps are all out of grid stays finite.
        top = keys.new_full(pixels, torch.finfo(keys.dtype).min)
        total = keys.new_zeros(pixels)
        moved = keys.new_zeros((n, *pixels))
        for run, template in zip(runs, templates, strict=True):
            scores = memory.fill(block, keys[items], run, size, first, last)
            new_top = torch.maximum(top, scores.amax(0))
            weights = scores.sub_(new_top).exp_()
            shrink = (top - new_top).exp_()
            total.mul_(shrink).add_(weights.sum(0))
            moved.mul_(shrink).add_((template.T @ weights.flatten(1)).view(moved.shape))
            top = new_top
        moved = moved.div_(total).movedim(0, 2)
        lse[items, :, first:last] = total.log_().add_(top)
        if groups > 1:
            vectors[items, :, :, first:last] = moved
        out[items, :, first:last] = moved.mean(1)


def _torch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    vectors: Tensor,
    dq: Tensor,
    dk: Tensor,
    window: Sequence[int],
    groups: int,
    scale: float,
) -> None:
    size, n = q.shape[2:], q.ndim - 2
    runs, taps, row_scores = _plan(q, window, groups)
    templates = [_template(run, out) for run in runs]
    queries, keys = _grouped(q, groups), _grouped(k, groups)
    dq_groups, dk_groups = dq.unflatten(1, (groups, -1)), torch.zeros_like(keys)
    per_group = vectors if groups > 1 else out.unsqueeze(1)
    memory = _Scores(keys, taps)
    for items, first, last in _blocks(q.shape[0], size[0], row_scores):
        block = queries[items, :, :, first:last] * scale
        g = grad[items, :, first:last].to(keys.dtype) / groups
        level = (g.unsqueeze(1) * per_group[items, :, :, first:last]).sum(2)
        dq_block, dk_block = torch.zeros_like(block), dk_groups[items]
        g_rows = g.movedim(1, 0).reshape(n, -1)
        for run, template in zip(runs, templates, strict=True):
            scores = memory.fill(block, keys[items], run, size, first, last)
            weights = scores.sub_(lse[items, :, first:last]).exp_()
            pull = (template @ g_rows).view(len(run), g.shape[0], 1, *g.shape[2:])
            slopes = weights.mul_(pull.sub_(level) if groups == 1 else pull - level)
            for slope, offset in zip(slopes, run, strict=True):
                if (boxes := _boxes(offset, size, first, last)) is None:
                    continue
                in_block, _, neighbours = boxes
                ds = slope[in_block].unsqueeze(2)
                dq_block[in_block].addcmul_(ds, keys[items][neighbours])
                dk_block[neighbours].addcmul_(ds, block[in_block])
        dq_groups[items, :, :, first:last] = dq_block.mul_(scale)
    dk.copy_(dk_groups.flatten(1, 2))
