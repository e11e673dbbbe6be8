"""The Triton kernels of the local normalised cross-correlation (SPEC 9, GVSL Eq. 1), value and slopes.

Sums over windows are taken in two passes, within planes and then along z; in 2D the first is all. A pass serves grids
`(outer, rows, columns)`: planes `(B C Z, Y, X)`, with taps along y and x; then volumes `(B C, Z, Y X)`, with taps along
z alone. A lane serves one column and walks along the rows, the sums over taps along x of those in its window in
registers (`KEEP`), so that every row is read once; of a wider window they are made anew for every row. What is out of
the grid adds nothing. Maps between passes are contiguous `(maps, B, C, *S)` in the accumulator, images dense by sample.

Images are shifted by half a unit, so that of [0, 1] the difference of a mean square and a squared mean loses least.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

SHIFT = tl.constexpr(0.5)


@triton.jit
def _place(rows, columns, TILE: tl.constexpr, STEPS: tl.constexpr):
    """Outer index, where its grid begins, first and last row of this program; column of its lanes."""
    tiles, walks = tl.cdiv(columns, TILE), tl.cdiv(rows, STEPS)
    program = tl.program_id(0)
    i = (program % tiles) * TILE + tl.arange(0, TILE)
    program = program // tiles
    first, outer = (program % walks) * STEPS, (program // walks).to(tl.int64)
    return outer, outer * rows * columns, first, tl.minimum(first + STEPS, rows), i


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
def _row_of_maps(maps, pixels, j, i, rows, columns, MAPS: tl.constexpr, WINDOW: tl.constexpr):
    """Sums over the taps along row `j` of every map."""
    sums = ()
    for _ in tl.static_range(MAPS):
        sums += (tl.zeros(i.shape, maps.dtype.element_ty),)
    end, line = tl.where((j >= 0) & (j < rows), columns, 0), maps + tl.cast(j, tl.int64) * columns
    for t in range(WINDOW):
        c = i + (t - WINDOW // 2)
        keep = (c >= 0) & (c < end)
        added = ()
        for k in tl.static_range(MAPS):
            added += (sums[k] + tl.load(line + k * pixels + c, mask=keep, other=0),)
        sums = added
    return sums


@triton.jit
def _row(x, y, maps, pixels, j, i, rows, columns, MAPS: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Of the images where there are no maps yet."""
    if MAPS == 0:
        row = _row_of_images(x, y, j, i, rows, columns, WINDOW, ACC)
    else:
        row = _row_of_maps(maps, pixels, j, i, rows, columns, MAPS, WINDOW)
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
    x, y, maps, pixels, first, i, rows, columns,
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
            kept = _pushed(kept, _row(x, y, maps, pixels, j, i, rows, columns, MAPS, WINDOW_C, ACC))
    return kept


@triton.jit
def _window(
    kept, x, y, maps, pixels, j, i, rows, columns,
    MAPS: tl.constexpr, WINDOW_R: tl.constexpr, WINDOW_C: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows kept and sums over the window around row `j`."""
    if KEEP:
        kept = _pushed(kept, _row(x, y, maps, pixels, j + WINDOW_R // 2, i, rows, columns, MAPS, WINDOW_C, ACC))
        sums = kept[0]
        for k in tl.static_range(1, WINDOW_R):
            sums = _plus(sums, kept[k])
    else:
        low, high = tl.maximum(j - WINDOW_R // 2, 0), tl.minimum(j + WINDOW_R // 2, rows - 1)
        sums = _row(x, y, maps, pixels, low, i, rows, columns, MAPS, WINDOW_C, ACC)
        for r in range(low + 1, high + 1):
            sums = _plus(sums, _row(x, y, maps, pixels, r, i, rows, columns, MAPS, WINDOW_C, ACC))
    return kept, sums


@triton.jit
def _reached(j, size, WINDOW: tl.constexpr):
    """Pixels along an axis that the window around pixel `j` has in the grid."""
    return tl.minimum(j + WINDOW // 2, size - 1) - tl.maximum(j - WINDOW // 2, 0) + 1


@triton.jit(
    do_not_specialize=("x_b", "y_b", "pixels", "per_sample", "rows", "columns", "size_x", "eps"),
)
def ncc_moments_kernel(
    x, y, maps, out, partials, x_b: tl.int64, y_b: tl.int64, pixels: tl.int64, per_sample, rows, columns, size_x,
    eps: tl.int64,
    MAPS: tl.constexpr, LAST: tl.constexpr, TO_X: tl.constexpr, TO_Y: tl.constexpr, NDIM: tl.constexpr,
    WINDOW_R: tl.constexpr, WINDOW_C: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A pass over x, y, x^2, y^2 and x y, from the images (`MAPS` 0) or from the five maps of the pass before.

    Not the last: `out` is the five maps of sums. The last: the sum of the squared correlation over this program's
    pixels, partials `(programs,)`, and in `out` the maps by which slopes are made: for every window a, then b and c of
    y if asked, then those of x, such that its slope by one of its pixels is `a x + b y + c` (for x, `a y + b x + c`).
    """
    outer, begin, first, last, i = _place(rows, columns, TILE, STEPS)
    if MAPS == 0:
        x, y = _image(x, x_b, outer, per_sample, rows, columns), _image(y, y_b, outer, per_sample, rows, columns)
    else:
        maps += begin
    keep, total = i < columns, tl.zeros([TILE], ACC)
    # Pixels that windows have in the grid, but for the axis of the walk; at least 1 where there is no pixel either.
    across = tl.maximum(_reached(i % size_x, size_x, WINDOW_X), 1)
    if NDIM == 3:
        across *= tl.maximum(_reached(i // size_x, columns // size_x, WINDOW_Y), 1)
    least = eps.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
    kept = _before(x, y, maps, pixels, first, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
    for j in range(first, last):
        kept, sums = _window(kept, x, y, maps, pixels, j, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
        to = out + (begin + tl.cast(j, tl.int64) * columns) + i
        if not LAST:
            for k in tl.static_range(5):
                tl.store(to + k * pixels, sums[k], mask=keep)
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
                tl.store(to + pixels, b, mask=keep)
                tl.store(to + 2 * pixels, -a * m_x - b * m_y, mask=keep)
            if TO_X:
                b = -2 * n * match * over_x
                tl.store(to + (1 + 2 * TO_Y) * pixels, b, mask=keep)
                tl.store(to + (2 + 2 * TO_Y) * pixels, -a * m_y - b * m_x, mask=keep)
    if LAST:
        tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=("x_b", "y_b", "pixels", "per_sample", "rows", "columns"))
def ncc_slopes_kernel(
    x, y, maps, out, d_x, d_y, x_b: tl.int64, y_b: tl.int64, pixels: tl.int64, per_sample, rows, columns,
    MAPS: tl.constexpr, LAST: tl.constexpr, TO_X: tl.constexpr, TO_Y: tl.constexpr,
    WINDOW_R: tl.constexpr, WINDOW_C: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A pass over the maps of slopes; the windows that hold a pixel are those in the window around it.

    Not the last: `out` is the maps' sums. The last: the slopes of the summed squared correlation, d_x and d_y,
    contiguous.
    """
    outer, begin, first, last, i = _place(rows, columns, TILE, STEPS)
    if LAST:
        x, y = _image(x, x_b, outer, per_sample, rows, columns), _image(y, y_b, outer, per_sample, rows, columns)
    maps += begin
    keep = i < columns
    kept = _before(x, y, maps, pixels, first, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
    for j in range(first, last):
        kept, sums = _window(kept, x, y, maps, pixels, j, i, rows, columns, MAPS, WINDOW_R, WINDOW_C, KEEP, ACC)
        line = tl.cast(j, tl.int64) * columns
        if not LAST:
            for k in tl.static_range(MAPS):
                tl.store(out + (begin + line) + k * pixels + i, sums[k], mask=keep)
        else:
            u = tl.load(x + line + i, mask=keep, other=0.5).to(ACC) - SHIFT
            v = tl.load(y + line + i, mask=keep, other=0.5).to(ACC) - SHIFT
            if TO_Y:
                tl.store(d_y + (begin + line) + i, sums[0] * u + sums[1] * v + sums[2], mask=keep)
            if TO_X:
                slope = sums[0] * v + sums[1 + 2 * TO_Y] * u + sums[2 + 2 * TO_Y]
                tl.store(d_x + (begin + line) + i, slope, mask=keep)
