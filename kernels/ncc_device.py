"""The Triton kernels of the local normalised cross-correlation (SPEC 9, GVSL Eq. 1), value and slopes.

Sums over windows are taken in two passes: within planes, `(B C Z, Y, X)`, and along z, `(B C, Z, Y X)`; those of slopes
the other way round. In 2D there are planes alone. A lane serves a column of such a grid `(outer, rows, columns)` and
walks along the rows; it keeps the sums along the rows in its window in registers (`KEEP`), so that it reads every row
once, or makes them anew for every window, where that is too wide. What is out of the grid adds nothing. Maps are in the
accumulator, so many elements `apart`, their rows `pitch`; images are contiguous by sample.

Images are shifted by half a unit, so that of [0, 1] the difference of a mean square and a squared mean loses least.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

SHIFT = tl.constexpr(0.5)


@triton.jit
def _place(rows, columns, TILE: tl.constexpr, STEPS: tl.constexpr):
    """Outer index, first and last row of this program; column of its lanes."""
    tiles, walks = tl.cdiv(columns, TILE), tl.cdiv(rows, STEPS)
    program = tl.program_id(0)
    i = (program % tiles) * TILE + tl.arange(0, TILE)
    program = program // tiles
    first, outer = (program % walks) * STEPS, (program // walks).to(tl.int64)
    return outer, first, tl.minimum(first + STEPS, rows), i


@triton.jit
def _image(x, x_b, outer, per_sample, rows, columns):
    """Where the grid of this outer index begins in an image whose samples are `x_b` apart."""
    return x + (outer // per_sample) * x_b + (outer % per_sample) * rows * columns


@triton.jit
def _row_of_images(x, y, j, i, rows, columns, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Sums over the taps along row `j` of x, y, x^2, y^2, x y."""
    zero = tl.zeros(i.shape, ACC)
    s_x, s_y, s_xx, s_yy, s_xy = zero, zero, zero, zero, zero
    end, line = tl.where((j >= 0) & (j < rows), columns, 0), tl.cast(j, tl.int64) * columns
    for t in range(WINDOW):
        c = i + (t - WINDOW // 2)
        keep = (c >= 0) & (c < end)
        u = tl.load(x + line + c, mask=keep, other=0.5).to(ACC) - SHIFT
        v = tl.load(y + line + c, mask=keep, other=0.5).to(ACC) - SHIFT
        s_x, s_y, s_xx, s_yy, s_xy = s_x + u, s_y + v, s_xx + u * u, s_yy + v * v, s_xy + u * v
    return s_x, s_y, s_xx, s_yy, s_xy


@triton.jit
def _row_of_maps(maps, apart, pitch, j, i, rows, columns, MAPS: tl.constexpr, WINDOW: tl.constexpr):
    """Sums over the taps along row `j` of every map."""
    sums = ()
    for _ in tl.static_range(MAPS):
        sums += (tl.zeros(i.shape, maps.dtype.element_ty),)
    end, line = tl.where((j >= 0) & (j < rows), columns, 0), maps + j * pitch
    for t in range(WINDOW):
        c = i + (t - WINDOW // 2)
        keep = (c >= 0) & (c < end)
        added = ()
        for k in tl.static_range(MAPS):
            added += (sums[k] + tl.load(line + k * apart + c, mask=keep, other=0),)
        sums = added
    return sums


@triton.jit
def _row(x, y, maps, apart, pitch, j, i, rows, columns, MAPS: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Of the images where there are no maps yet."""
    if MAPS == 0:
        row = _row_of_images(x, y, j, i, rows, columns, WINDOW, ACC)
    else:
        row = _row_of_maps(maps, apart, pitch, j, i, rows, columns, MAPS, WINDOW)
    return row


@triton.jit
def _plus(a, b):
    total = ()
    for k in tl.static_range(len(a)):
        total += (a[k] + b[k],)
    return total


@triton.jit
def _pushed(kept, row):
    """The rows in the window, without the oldest and with a new one."""
    later = ()
    for k in tl.static_range(1, len(kept)):
        later += (kept[k],)
    later += (row,)
    return later


@triton.jit
def _before(
    x, y, maps, apart, pitch, first, i, rows, columns,
    MAPS: tl.constexpr, WINDOW_R: tl.constexpr, WINDOW_C: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The rows kept when a walk begins: all but the last of the first window."""
    kept = ()
    if KEEP:
        none = ()
        for _ in tl.static_range(5 if MAPS == 0 else MAPS):
            none += (tl.zeros(i.shape, ACC),)
        for _ in tl.static_range(WINDOW_R):
            kept += (none,)
        for j in range(first - WINDOW_R // 2, first + WINDOW_R // 2):
            kept = _pushed(kept, _row(x, y, maps, apart, pitch, j, i, rows, columns, MAPS, WINDOW_C, ACC))
    return kept


@triton.jit
def _window(
    kept, x, y, maps, apart, pitch, j, i, rows, columns,
    MAPS: tl.constexpr, WINDOW_R: tl.constexpr, WINDOW_C: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows kept and sums over the window around row `j`."""
    if KEEP:
        kept = _pushed(kept, _row(x, y, maps, apart, pitch, j + WINDOW_R // 2, i, rows, columns, MAPS, WINDOW_C, ACC))
        sums = kept[0]
        for k in tl.static_range(1, WINDOW_R):
            sums = _plus(sums, kept[k])
    else:
        low, high = tl.maximum(j - WINDOW_R // 2, 0), tl.minimum(j + WINDOW_R // 2, rows - 1)
        sums = _row(x, y, maps, apart, pitch, low, i, rows, columns, MAPS, WINDOW_C, ACC)
        for r in range(low + 1, high + 1):
            sums = _plus(sums, _row(x, y, maps, apart, pitch, r, i, rows, columns, MAPS, WINDOW_C, ACC))
    return kept, sums


@triton.jit
def _reached(j, size, WINDOW: tl.constexpr):
    """Pixels along an axis that the window around pixel `j` has in the grid."""
    return tl.minimum(j + WINDOW // 2, size - 1) - tl.maximum(j - WINDOW // 2, 0) + 1


@triton.jit(
    do_not_specialize=(
        "x_b", "y_b", "apart", "pitch", "out_apart", "out_pitch", "per_sample", "rows", "columns", "column", "size_x",
        "eps",
    )
)  # fmt: skip
def ncc_moments_kernel(
    x, y, maps, out, partials, x_b: tl.int64, y_b: tl.int64, apart: tl.int64, pitch: tl.int64, out_apart: tl.int64,
    out_pitch: tl.int64, per_sample, rows, columns, column, size_x, eps: tl.int64,
    MAPS: tl.constexpr, LAST: tl.constexpr, TO_X: tl.constexpr, TO_Y: tl.constexpr, NDIM: tl.constexpr,
    WINDOW_R: tl.constexpr, WINDOW_C: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A pass over x, y, x^2, y^2 and x y, from the images (`MAPS` 0) or from five maps.

    Not the last: `out` is the five maps of sums. The last, over the columns from number `column` on: partials
    `(programs,)` of the summed match, and as `out` the maps that make its slopes. For every window a, then b and c of y
    if asked, then those of x: by a pixel in it, its match has the slope `a x + b y + c` (for x, `a y + b x + c`).
    """
    outer, first, last, i = _place(rows, columns, TILE, STEPS)
    if MAPS == 0:
        x, y = _image(x, x_b, outer, per_sample, rows, columns), _image(y, y_b, outer, per_sample, rows, columns)
    else:
        maps += outer * rows * pitch
    keep, total = i < columns, tl.zeros([TILE], ACC)
    least = eps.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
    # Pixels of a window in the grid, but for its rows; at least 1 where there is no pixel either.
    across = tl.maximum(_reached((column + i) % size_x, size_x, WINDOW_X), 1)
    if NDIM == 3:
        across *= tl.maximum(_reached((column + i) // size_x, pitch.to(tl.int32) // size_x, WINDOW_Y), 1)
    kept = _before(x, y, maps, apart, pitch, first, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
    for j in range(first, last):
        kept, sums = _window(kept, x, y, maps, apart, pitch, j, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
        to = out + (outer * rows + j) * out_pitch + i
        if not LAST:
            for k in tl.static_range(5):
                tl.store(to + k * out_apart, sums[k], mask=keep)
        else:
            n = (across * _reached(j, rows, WINDOW_R)).to(ACC)
            # Everything n^2 times as large: fewer divisions, and where images are constant no remainder of one.
            v_x, v_y = n * sums[2] - sums[0] * sums[0], n * sums[3] - sums[1] * sums[1]
            # Rounding leaves no negative variance, and no covariance without one. What is not a number stays so.
            v_x, v_y = tl.where(v_x < 0, 0.0, v_x), tl.where(v_y < 0, 0.0, v_y)
            cross, most = n * sums[4] - sums[0] * sums[1], tl.sqrt(v_x) * tl.sqrt(v_y)
            cross = tl.where(cross > most, most, tl.where(cross < -most, -most, cross))
            over_x, over_y = 1 / (v_x + least * n * n), 1 / (v_y + least * n * n)
            match = (cross * over_x) * (cross * over_y)
            total += tl.where(keep, match, 0.0)
            if TO_X or TO_Y:
                m_x, m_y = sums[0] / n, sums[1] / n
                a = 2 * n * (cross * over_x) * over_y
                tl.store(to, a, mask=keep)
            if TO_Y:
                b = -2 * n * match * over_y
                tl.store(to + out_apart, b, mask=keep)
                tl.store(to + 2 * out_apart, -a * m_x - b * m_y, mask=keep)
            if TO_X:
                b = -2 * n * match * over_x
                tl.store(to + (1 + 2 * TO_Y) * out_apart, b, mask=keep)
                tl.store(to + (2 + 2 * TO_Y) * out_apart, -a * m_y - b * m_x, mask=keep)
    if LAST:
        tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit(
    do_not_specialize=(
        "x_b", "y_b", "apart", "pitch", "out_apart", "out_pitch", "per_sample", "rows", "columns",
    )
)  # fmt: skip
def ncc_slopes_kernel(
    x, y, maps, out, d_x, d_y, x_b: tl.int64, y_b: tl.int64, apart: tl.int64, pitch: tl.int64, out_apart: tl.int64,
    out_pitch: tl.int64, per_sample, rows, columns,
    MAPS: tl.constexpr, LAST: tl.constexpr, TO_X: tl.constexpr, TO_Y: tl.constexpr,
    WINDOW_R: tl.constexpr, WINDOW_C: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A pass over the maps that make the slopes; the windows that hold a pixel are those in the window around it.

    Not the last: `out` is the maps' sums. The last: the slopes of the summed match, d_x and d_y, contiguous.
    """
    outer, first, last, i = _place(rows, columns, TILE, STEPS)
    if LAST:
        x, y = _image(x, x_b, outer, per_sample, rows, columns), _image(y, y_b, outer, per_sample, rows, columns)
    maps += outer * rows * pitch
    keep = i < columns
    kept = _before(x, y, maps, apart, pitch, first, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
    for j in range(first, last):
        kept, sums = _window(kept, x, y, maps, apart, pitch, j, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
        if not LAST:
            to = out + (outer * rows + j) * out_pitch + i
            for k in tl.static_range(MAPS):
                tl.store(to + k * out_apart, sums[k], mask=keep)
        else:
            line, at = tl.cast(j, tl.int64) * columns, (outer * rows + j) * columns
            u = tl.load(x + line + i, mask=keep, other=0.5).to(ACC) - SHIFT
            v = tl.load(y + line + i, mask=keep, other=0.5).to(ACC) - SHIFT
            if TO_Y:
                tl.store(d_y + at + i, sums[0] * u + sums[1] * v + sums[2], mask=keep)
            if TO_X:
                tl.store(d_x + at + i, sums[0] * v + sums[1 + 2 * TO_Y] * u + sums[2 + 2 * TO_Y], mask=keep)
