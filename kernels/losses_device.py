"""The Triton kernels of the losses (SPEC 6): one pass over the pixels that computes field, mask, error and its sum.

A program leaves the sums over its pixels in one row of `partials`; the rows are added afterwards, in a fixed order.
`MASK`: "none", "inside" (made from the true field), "tensor" (bytes `(B, 1, *S)`, contiguous). What the mask leaves out
is not even read from the features, and may be anything.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

from coverfast.kernels.field_device import cell, displacement, line_of, place, points_inside
from coverfast.kernels.warp_device import lanes_summed, sample, scatter


@triton.jit
def _counted(mask, psi, b, z, y, x, keep, size_z, size_y, size_x, NDIM: tl.constexpr, MASK: tl.constexpr):
    """Pixels that count."""
    if MASK == "inside":
        keep = keep & points_inside(psi, z, y, x, size_z, size_y, size_x, NDIM)
    elif MASK == "tensor":
        line = mask + (b * size_z + z) * (size_y.to(tl.int64) * size_x)
        keep = keep & (tl.load(line + (y * size_x + x), mask=keep, other=0) != 0)
    return keep


@triton.jit
def _norm(parts):
    return tl.sqrt(parts[0] * parts[0] + parts[1] * parts[1] + parts[2] * parts[2])


@triton.jit
def _gap(pred, true):
    return pred[0] - true[0], pred[1] - true[1], pred[2] - true[2]


# --- errors of a field -----------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=(
        "p_b", "p_c", "p_z", "p_y", "p_x", "f_b", "f_c", "f_z", "f_y", "f_x", "size_z", "size_y", "size_x",
    )
)  # fmt: skip
def field_errors_forward_kernel(
    pred, field, mask, partials, p_b, p_c, p_z, p_y, p_x, f_b, f_c, f_z, f_y, f_x, size_z, size_y, size_x,
    NDIM: tl.constexpr, FIELD: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):  # fmt: skip
    """Sums of |gap|_1, |gap|_2 and |true|_2 over the pixels that count, and their number: partials `(programs, 4)`."""
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    psi = displacement(pred, p_b, p_c, p_z, p_y, p_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
    true = displacement(field, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, FIELD)
    on = _counted(mask, true, b, z, y, x, keep, size_z, size_y, size_x, NDIM, MASK)
    gap = _gap(psi, true)
    sums = partials + tl.program_id(0).to(tl.int64) * 4
    tl.store(sums, tl.sum(tl.where(on, tl.abs(gap[0]) + tl.abs(gap[1]) + tl.abs(gap[2]), 0.0)))
    tl.store(sums + 1, tl.sum(tl.where(on, _norm(gap), 0.0)))
    tl.store(sums + 2, tl.sum(tl.where(on, _norm(true), 0.0)))
    tl.store(sums + 3, tl.sum(on.to(partials.dtype.element_ty)))


@triton.jit
def _over(value, norm):
    """Value / norm, 0 where both are."""
    return tl.where(norm == 0, 0.0, value / tl.where(norm == 0, 1.0, norm))


@triton.jit(
    do_not_specialize=(
        "p_b", "p_c", "p_z", "p_y", "p_x", "f_b", "f_c", "f_z", "f_y", "f_x", "size_z", "size_y", "size_x",
    )
)  # fmt: skip
def field_errors_backward_kernel(
    grad, pred, field, mask, d_pred, d_true, p_b, p_c, p_z, p_y, p_x, f_b, f_c, f_z, f_y, f_x, size_z, size_y, size_x,
    NDIM: tl.constexpr, FIELD: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr, TO_TRUE: tl.constexpr,
):  # fmt: skip
    """Fill d_pred and, if asked, d_true, `(B, n, *S)` contiguous, from the gradient `(4,)` of the sums."""
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    psi = displacement(pred, p_b, p_c, p_z, p_y, p_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
    true = displacement(field, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, FIELD)
    on = _counted(mask, true, b, z, y, x, keep, size_z, size_y, size_x, NDIM, MASK)
    gap = _gap(psi, true)
    kind = d_pred.dtype.element_ty
    of_l1, of_l2, of_still = tl.load(grad).to(kind), tl.load(grad + 1).to(kind), tl.load(grad + 2).to(kind)
    size = size_z.to(tl.int64) * size_y * size_x
    at = b * NDIM * size + z.to(tl.int64) * size_y * size_x + (y * size_x + x)
    for i in tl.static_range(3 - NDIM, 3):
        sign = tl.where(gap[i] > 0, 1.0, tl.where(gap[i] < 0, -1.0, gap[i] * 0))
        slope = tl.where(on, of_l1 * sign + of_l2 * _over(gap[i], _norm(gap)), 0.0)
        where = at + (i - (3 - NDIM)) * size
        tl.store(d_pred + where, slope.to(d_pred.dtype.element_ty), mask=keep)
        if TO_TRUE:
            still = tl.where(on, of_still * _over(true[i], _norm(true)), 0.0)
            tl.store(d_true + where, (still - slope).to(d_true.dtype.element_ty), mask=keep)


# --- consistency of features -----------------------------------------------------------------------------------------


@triton.jit
def _pair(
    base_a, line_b, first, cells, on, channels, size_z, size_y, size_x, a_c, a_z, a_y, b_c,
    NDIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr, A_X: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """`(T, CHUNK)` channels of view a, brought over, and of view b."""
    a = sample(
        base_a, a_c, first, cells, on, channels, size_z, size_y, size_x, a_z, a_y, A_X, UNIT, ROWS, CHUNK, NDIM, False,
        ACC,
    )  # fmt: skip
    c = first[:, None] + tl.arange(0, CHUNK)[None, :]
    mask = (on & (first < channels))[:, None]
    return a, tl.load(line_b + (c if ROWS else c * b_c), mask=mask, other=0).to(ACC)


@triton.jit
def _matched(
    feat_a, feat_b, field, mask, a_b, a_c, a_z, a_y, b_b, b_c, b_z, b_y, f_b, f_c, f_z, f_y, f_x,
    size_z, size_y, size_x, channels,
    NDIM: tl.constexpr, FIELD: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    LANES: tl.constexpr, UNIT: tl.constexpr, A_X: tl.constexpr, B_X: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, ACC: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Of this program's lanes: places, cells, where to read, the last channels read; dot and squared norms by pixel."""
    b, z, y, x, block, keep = place(size_z, size_y, size_x, LANES, TILE_Y, TILE_X, WIDE)
    psi = displacement(field, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, FIELD)
    on = _counted(mask, psi, b, z, y, x, keep, size_z, size_y, size_x, NDIM, MASK)
    pixel, sizes = (z, y, x), (size_z, size_y, size_x)
    cells = ()
    for i in tl.static_range(3):
        cells += (cell(pixel[i].to(psi[i].dtype) + psi[i], sizes[i], WIDE, False),)
    base_a = feat_a + b * a_b * UNIT
    line_b = line_of(feat_b, b, z, b_b, b_z, UNIT) + (y * b_y * UNIT + x * B_X)[:, None]
    first = block.to(y.dtype) * CHUNK
    if SINGLE:
        u, v = _pair(
            base_a, line_b, first, cells, on, channels, size_z, size_y, size_x, a_c, a_z, a_y, b_c, NDIM, ROWS, CHUNK,
            UNIT, A_X, ACC,
        )  # fmt: skip
        dot, square_a, square_b = tl.sum(u * v, 1), tl.sum(u * u, 1), tl.sum(v * v, 1)
        pair = u, v
    else:
        pair = ()
        dot, square_a, square_b = tl.zeros(y.shape, ACC), tl.zeros(y.shape, ACC), tl.zeros(y.shape, ACC)
        for start in range(0, channels, LANES * CHUNK):
            u, v = _pair(
                base_a, line_b, first + start, cells, on, channels, size_z, size_y, size_x, a_c, a_z, a_y, b_c, NDIM,
                ROWS, CHUNK, UNIT, A_X, ACC,
            )  # fmt: skip
            dot, square_a, square_b = dot + tl.sum(u * v, 1), square_a + tl.sum(u * u, 1), square_b + tl.sum(v * v, 1)
    sums = lanes_summed(dot, LANES), lanes_summed(square_a, LANES), lanes_summed(square_b, LANES)
    return (b, z, y, x, keep, on), cells, (base_a, line_b, first), pair, sums


@triton.jit(
    do_not_specialize=(
        "a_b", "a_c", "a_z", "a_y", "b_b", "b_c", "b_z", "b_y", "f_b", "f_c", "f_z", "f_y", "f_x", "size_z", "size_y",
        "size_x", "channels",
    )
)  # fmt: skip
def consistency_forward_kernel(
    feat_a, feat_b, field, mask, partials, a_b, a_c, a_z, a_y, b_b, b_c, b_z, b_y, f_b, f_c, f_z, f_y, f_x,
    size_z, size_y, size_x, channels,
    NDIM: tl.constexpr, FIELD: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    LANES: tl.constexpr, UNIT: tl.constexpr, A_X: tl.constexpr, B_X: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, ACC: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """The sum of cosines over the pixels that count, and their number: partials `(programs, 2)`."""
    place_, _, _, _, sums = _matched(
        feat_a, feat_b, field, mask, a_b, a_c, a_z, a_y, b_b, b_c, b_z, b_y, f_b, f_c, f_z, f_y, f_x, size_z, size_y,
        size_x, channels, NDIM, FIELD, MASK, ROWS, CHUNK, LANES, UNIT, A_X, B_X, WIDE, TILE_Y, TILE_X, ACC, SINGLE,
    )  # fmt: skip
    dot, square_a, square_b = sums
    least = tl.full([1], 1e-12, ACC)  # as a bare number it would be rounded to float32
    cosine = dot / (tl.sqrt(tl.maximum(square_a, least)) * tl.sqrt(tl.maximum(square_b, least)))
    on = lanes_summed(place_[5].to(tl.int32), LANES) > 0
    line = partials + tl.program_id(0).to(tl.int64) * 2
    tl.store(line, tl.sum(tl.where(on, cosine, 0.0)))
    tl.store(line + 1, tl.sum(on.to(partials.dtype.element_ty)))


@triton.jit
def _to_lanes(value, LANES: tl.constexpr):
    """`(T / LANES,)` repeated for the lanes of each pixel, `(T, 1)`."""
    if LANES == 1:
        return value[:, None]
    wide = tl.broadcast_to(value[:, None], [value.shape[0], LANES])
    return tl.reshape(wide, [value.shape[0] * LANES])[:, None]


@triton.jit(
    do_not_specialize=(
        "a_b", "a_c", "a_z", "a_y", "b_b", "b_c", "b_z", "b_y", "f_b", "f_c", "f_z", "f_y", "f_x", "d_b", "d_c", "d_z",
        "d_y", "e_b", "e_c", "e_z", "e_y", "size_z", "size_y", "size_x", "channels",
    )
)  # fmt: skip
def consistency_backward_kernel(
    grad, feat_a, feat_b, field, mask, d_a, d_b_out, a_b, a_c, a_z, a_y, b_b, b_c, b_z, b_y, f_b, f_c, f_z, f_y, f_x,
    d_b, d_c, d_z, d_y, e_b, e_c, e_z, e_y, size_z, size_y, size_x, channels,
    NDIM: tl.constexpr, FIELD: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    LANES: tl.constexpr, UNIT: tl.constexpr, A_X: tl.constexpr, B_X: tl.constexpr, D_X: tl.constexpr,
    E_X: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, ACC: tl.constexpr,
    SINGLE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Fill the gradient of view b (strides e), and add that of view a to `d_a` (strides d; zeros before).

    `DENSE` stores the gradient of the features brought over instead, on the grid of view b. `SINGLE`: one step reads
    all channels, so that the second pass finds them in registers.
    """
    place_, cells, where, pair, sums = _matched(
        feat_a, feat_b, field, mask, a_b, a_c, a_z, a_y, b_b, b_c, b_z, b_y, f_b, f_c, f_z, f_y, f_x, size_z, size_y,
        size_x, channels, NDIM, FIELD, MASK, ROWS, CHUNK, LANES, UNIT, A_X, B_X, WIDE, TILE_Y, TILE_X, ACC, SINGLE,
    )  # fmt: skip
    b, z, y, x, keep, on = place_
    base_a, line_b, first = where
    dot, square_a, square_b = sums
    least = tl.full([1], 1e-12, ACC)  # as a bare number it would be rounded to float32
    over_a, over_b = 1 / tl.sqrt(tl.maximum(square_a, least)), 1 / tl.sqrt(tl.maximum(square_b, least))
    slope, cosine = tl.load(grad).to(ACC), dot * over_a * over_b
    # d cos / d a = b / (|a| |b|) - cos a / |a|^2; without the second term where the norm is the constant 1e-6.
    both = _to_lanes(slope * over_a * over_b, LANES)
    own_a = _to_lanes(tl.where(square_a > least, slope * cosine * over_a * over_a, 0.0), LANES)
    own_b = _to_lanes(tl.where(square_b > least, slope * cosine * over_b * over_b, 0.0), LANES)
    to_a = d_a + b * d_b * UNIT
    if DENSE:
        to_a = line_of(d_a, b, z, d_b, d_z, UNIT) + (y * d_y * UNIT + x * D_X)[:, None]
    to_b = line_of(d_b_out, b, z, e_b, e_z, UNIT) + (y * e_y * UNIT + x * E_X)[:, None]
    for start in range(0, channels, LANES * CHUNK):
        now = first + start
        c = now[:, None] + tl.arange(0, CHUNK)[None, :]
        if SINGLE:
            u, v = pair
        else:
            u, v = _pair(
                base_a, line_b, now, cells, on, channels, size_z, size_y, size_x, a_c, a_z, a_y, b_c, NDIM, ROWS, CHUNK,
                UNIT, A_X, ACC,
            )  # fmt: skip
        mine = tl.where(on[:, None], both * v - own_a * u, 0.0)
        theirs = tl.where(on[:, None], both * u - own_b * v, 0.0)
        mask_ = (keep & (now < channels))[:, None]
        tl.store(to_b + (c if ROWS else c * e_c), theirs.to(d_b_out.dtype.element_ty), mask=mask_)
        if DENSE:
            tl.store(to_a + (c if ROWS else c * d_c), mine, mask=mask_)
        else:
            scatter(
                to_a, d_c, now, mine, 1.0, cells, on, channels, size_z, size_y, size_x, d_z, d_y, D_X, UNIT, ROWS,
                CHUNK, NDIM, False, False, False,
            )  # fmt: skip
