"""The Triton kernels of warping (SPEC 2) and of the transpose of up-sampling; see `field_device` for names.

A lane reads `CHUNK` channels of a corner in one load where channels are contiguous, one channel where they are not, and
walks over the rest. `channels`, strides and sizes are run-time numbers, but for the stride along x.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

from coverfast.kernels.field_device import (
    cell,
    corner_of,
    displacement,
    line_of,
    nearest,
    place,
    slope_signs,
    start_of,
)


@triton.jit
def cells_of(
    field, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x, from_z, from_y, from_x,
    NDIM: tl.constexpr, FIELD: tl.constexpr, ORIGIN: tl.constexpr, BORDER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The cells, along (z, y, x) of the source grid `from_*`, that pixels of the grid `size_*` look into."""
    psi = displacement(field, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, FIELD)
    pixel, sizes = (z, y, x), (from_z, from_y, from_x)
    cells = ()
    for i in tl.static_range(3):
        move = psi[i]
        if ORIGIN and i >= 3 - NDIM:
            move += start_of(field, b, i - (3 - NDIM), NDIM)
        cells += (cell(pixel[i].to(move.dtype) + move, sizes[i], WIDE, BORDER),)
    return cells


@triton.jit
def sample(
    base, x_c, first, cells, keep, channels, from_z, from_y, from_x, s_z, s_y, S_X: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, NDIM: tl.constexpr, BORDER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`(T, CHUNK)` channels from `first` (one number a lane) on, interpolated in the cells; 0 where not `keep`."""
    columns = tl.arange(0, CHUNK)[None, :]
    c = first[:, None] + columns
    base = base + (c if ROWS else c * x_c)
    keep = keep & (first < channels)
    total = tl.zeros(c.shape, ACC)
    for bz in tl.static_range(NDIM - 1):
        for by in tl.static_range(2):
            for bx in tl.static_range(2):
                at, weight, inside = corner_of(
                    cells, from_z, from_y, from_x, s_z, s_y, S_X, UNIT, bz, by, bx, NDIM, BORDER
                )
                # A corner without weight is not read: its value need not be finite.
                value = tl.load(base + at[:, None], mask=(keep & inside & (weight != 0))[:, None], other=0)
                total += weight.to(ACC)[:, None] * value.to(ACC)
    return total


@triton.jit(
    do_not_specialize=(
        "x_b", "x_c", "x_z", "x_y", "f_b", "f_c", "f_z", "f_y", "f_x", "y_b", "y_c", "y_z", "y_y", "size_z", "size_y",
        "size_x", "from_z", "from_y", "from_x", "channels",
    )
)  # fmt: skip
def warp_forward_kernel(
    x, field, out,
    x_b, x_c, x_z, x_y, f_b, f_c, f_z, f_y, f_x, y_b, y_c, y_z, y_y,
    size_z, size_y, size_x, from_z, from_y, from_x, channels,
    NDIM: tl.constexpr, FIELD: tl.constexpr, ORIGIN: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, X_X: tl.constexpr,
    Y_X: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Fill out `(B, C, *S)` from x `(B, C, *S')`, looked up where the field points."""
    b, z, y, x_of, block, keep = place(size_z, size_y, size_x, LANES, TILE_Y, TILE_X, WIDE)
    cells = cells_of(
        field, f_b, f_c, f_z, f_y, f_x, b, z, y, x_of, keep, size_z, size_y, size_x, from_z, from_y, from_x,
        NDIM, FIELD, ORIGIN, BORDER, WIDE,
    )  # fmt: skip
    columns = tl.arange(0, CHUNK)[None, :]
    source = x + b * x_b * UNIT
    target = line_of(out, b, z, y_b, y_z, UNIT) + (y * y_y * UNIT + x_of * Y_X)[:, None]
    lane = block.to(y.dtype) * CHUNK
    for start in range(0, channels, LANES * CHUNK):
        first = lane + start
        c = first[:, None] + columns
        if NEAREST:
            i_y, in_y = nearest(cells[1], from_y)
            i_x, in_x = nearest(cells[2], from_x)
            at, inside = i_y * x_y, in_y & in_x
            if NDIM == 3:
                i_z, in_z = nearest(cells[0], from_z)
                at, inside = at + i_z * x_z, inside & in_z
            at = at * UNIT + i_x * X_X
            mask = (keep & inside & (first < channels))[:, None]
            value = tl.load(source + (c if ROWS else c * x_c) + at[:, None], mask=mask, other=0)
        else:
            value = sample(
                source, x_c, first, cells, keep, channels, from_z, from_y, from_x, x_z, x_y, X_X, UNIT, ROWS, CHUNK,
                NDIM, BORDER, ACC,
            )  # fmt: skip
        where = target + (c if ROWS else c * y_c)
        tl.store(where, value.to(out.dtype.element_ty), mask=(keep & (first < channels))[:, None])


@triton.jit
def scatter(
    base, d_c, first, value, scale, cells, keep, channels, from_z, from_y, from_x, s_z, s_y, S_X: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, NDIM: tl.constexpr, NEAREST: tl.constexpr,
    BORDER: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Add `(T, CHUNK)` values to the corners of the cells, by weight: the transpose of `sample`.

    Several lanes may hit one element: atomic. `FIXED` adds integers, multiples of 1 / scale, in whatever order to the
    same sum.
    """
    columns = tl.arange(0, CHUNK)[None, :]
    c = first[:, None] + columns
    base = base + (c if ROWS else c * d_c)
    keep = keep & (first < channels)
    for bz in tl.static_range(1 if NEAREST else NDIM - 1):
        for by in tl.static_range(1 if NEAREST else 2):
            for bx in tl.static_range(1 if NEAREST else 2):
                if NEAREST:
                    i_y, in_y = nearest(cells[1], from_y)
                    i_x, in_x = nearest(cells[2], from_x)
                    at, inside = i_y * s_y, in_y & in_x
                    if NDIM == 3:
                        i_z, in_z = nearest(cells[0], from_z)
                        at, inside = at + i_z * s_z, inside & in_z
                    at, part = at * UNIT + i_x * S_X, value
                else:
                    at, weight, inside = corner_of(
                        cells, from_z, from_y, from_x, s_z, s_y, S_X, UNIT, bz, by, bx, NDIM, BORDER
                    )
                    inside = inside & (weight != 0)
                    part = weight.to(value.dtype)[:, None] * value
                if FIXED:
                    part = (part * scale).to(tl.int64)
                tl.atomic_add(base + at[:, None], part, mask=(keep & inside)[:, None], sem="relaxed")


@triton.jit
def lanes_summed(value, LANES: tl.constexpr):
    """`(T,)` to the sum over the lanes of each pixel, `(T / LANES,)`."""
    if LANES == 1:
        return value
    return tl.sum(tl.reshape(value, [value.shape[0] // LANES, LANES]), 1)


@triton.jit(
    do_not_specialize=(
        "g_b", "g_c", "g_z", "g_y", "x_b", "x_c", "x_z", "x_y", "f_b", "f_c", "f_z", "f_y", "f_x", "d_b", "d_c", "d_z",
        "d_y", "size_z", "size_y", "size_x", "from_z", "from_y", "from_x", "channels",
    )
)  # fmt: skip
def warp_backward_kernel(
    grad, x, field, dx, d_field, scale,
    g_b, g_c, g_z, g_y, x_b, x_c, x_z, x_y, f_b, f_c, f_z, f_y, f_x, d_b, d_c, d_z, d_y,
    size_z, size_y, size_x, from_z, from_y, from_x, channels,
    NDIM: tl.constexpr, FIELD: tl.constexpr, ORIGIN: tl.constexpr, NEAREST: tl.constexpr, BORDER: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, G_X: tl.constexpr,
    X_X: tl.constexpr, D_X: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    ACC: tl.constexpr, TO_X: tl.constexpr, TO_FIELD: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Add to dx (zeros before) the gradient of x, and fill d_field `(B, n, *S)`, contiguous, with that of psi."""
    b, z, y, x_of, block, keep = place(size_z, size_y, size_x, LANES, TILE_Y, TILE_X, WIDE)
    cells = cells_of(
        field, f_b, f_c, f_z, f_y, f_x, b, z, y, x_of, keep, size_z, size_y, size_x, from_z, from_y, from_x,
        NDIM, FIELD, ORIGIN, BORDER, WIDE,
    )  # fmt: skip
    columns = tl.arange(0, CHUNK)[None, :]
    slope = line_of(grad, b, z, g_b, g_z, UNIT) + (y * g_y * UNIT + x_of * G_X)[:, None]
    source, target = x + b * x_b * UNIT, dx + b * d_b * UNIT
    factor = tl.load(scale) if FIXED else 1.0
    lane = block.to(y.dtype) * CHUNK
    pull_z, pull_y, pull_x = tl.zeros(y.shape, ACC), tl.zeros(y.shape, ACC), tl.zeros(y.shape, ACC)
    for start in range(0, channels, LANES * CHUNK):
        first = lane + start
        c = first[:, None] + columns
        on = (keep & (first < channels))[:, None]
        g = tl.load(slope + (c if ROWS else c * g_c), mask=on, other=0).to(ACC)
        if TO_X:
            scatter(
                target, d_c, first, g, factor, cells, keep, channels, from_z, from_y, from_x, d_z, d_y, D_X, UNIT, ROWS,
                CHUNK, NDIM, NEAREST, BORDER, FIXED,
            )  # fmt: skip
        if TO_FIELD:
            rows = source + (c if ROWS else c * x_c)
            for bz in tl.static_range(NDIM - 1):
                for by in tl.static_range(2):
                    for bx in tl.static_range(2):
                        at, _, inside = corner_of(
                            cells, from_z, from_y, from_x, x_z, x_y, X_X, UNIT, bz, by, bx, NDIM, BORDER
                        )
                        value = tl.load(rows + at[:, None], mask=on & inside[:, None], other=0).to(ACC)
                        pull = tl.sum(g * value, 1)
                        d_z_, d_y_, d_x_ = slope_signs(cells, from_z, from_y, from_x, bz, by, bx, NDIM)
                        if NDIM == 3:
                            pull_z += d_z_.to(ACC) * pull
                        pull_y += d_y_.to(ACC) * pull
                        pull_x += d_x_.to(ACC) * pull
    if TO_FIELD:
        pulls = (pull_z, pull_y, pull_x)
        _, _, y_1, x_1, _, keep_1 = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
        size = size_z.to(tl.int64) * size_y * size_x
        line = d_field + b * NDIM * size + z.to(tl.int64) * size_y * size_x + (y_1 * size_x + x_1)
        for i in tl.static_range(3 - NDIM, 3):
            value = lanes_summed(pulls[i], LANES).to(d_field.dtype.element_ty)
            tl.store(line + (i - (3 - NDIM)) * size, value, mask=keep_1)


@triton.jit(do_not_specialize=("size_z", "size_y", "size_x"))
def upsample_backward_kernel(
    grad, scale, out, size_z, size_y, size_x,
    NDIM: tl.constexpr, FIXED: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """The transpose of up-sampling and doubling: grad `(B, n, *2S)` to out `(B, n, *S)`, both contiguous.

    A coarse pixel gathers from the up to four fine ones along each axis that looked at it. `size_*` are those of `out`,
    whose `B * n` planes are what `place` takes for samples. `FIXED`: grad holds integers; scale is what one is worth.
    """
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    fine = grad + b * (size_z.to(tl.int64) * size_y * size_x * (8 if NDIM == 3 else 4))
    total = tl.zeros(y.shape, out.dtype.element_ty)
    for tap_z in tl.static_range(4 if NDIM == 3 else 1):
        for tap_y in tl.static_range(4):
            for tap_x in tl.static_range(4):
                at_y, w_y, in_y = _tap(y, size_y, tap_y, out.dtype.element_ty)
                at_x, w_x, in_x = _tap(x, size_x, tap_x, out.dtype.element_ty)
                at, weight, inside = at_y * (2 * size_x) + at_x, w_y * w_x, keep & in_y & in_x
                line = fine
                if NDIM == 3:
                    at_z, w_z, in_z = _tap(z, size_z, tap_z, out.dtype.element_ty)
                    line += at_z.to(tl.int64) * (4 * size_y.to(tl.int64) * size_x)
                    weight, inside = w_z * weight, inside & in_z
                value = tl.load(line + at, mask=inside, other=0)
                total += weight * value.to(out.dtype.element_ty)
    total *= 2
    if FIXED:
        total *= tl.load(scale)
    line = out + (b * size_z + z) * (size_y.to(tl.int64) * size_x) + (y * size_x + x)
    tl.store(line, total, mask=keep)


@triton.jit
def _tap(c, size, TAP: tl.constexpr, DTYPE: tl.constexpr):
    """The fine pixel `2 c - 1 + TAP`, how much of it is coarse pixel `c`, and whether there is such a pixel."""
    at = 2 * c - 1 + TAP
    weight = (c * 0).to(DTYPE) + (0.75 if TAP == 1 or TAP == 2 else 0.25)
    # At the border a fine pixel has no second coarse one: all of it is the outermost.
    if TAP == 1:
        weight = tl.where(c == 0, 1.0, weight)
    if TAP == 2:
        weight = tl.where(c == size - 1, 1.0, weight)
    return at, weight, (at >= 0) & (at < 2 * size)
