"""The Triton kernels of the projections' norm: a bias, then each sample normalised over channels and pixels.

A program walks over tiles `(P, C)` of pixels by channels of one sample; `SPLIT` programs share a sample and leave what
they found in `partials`, which the next launch merges in a fixed order. Maps are dense, in rows of channels or plane by
plane (`X_ROWS` and so on), their samples any distance apart; what is written for `mov` is in rows.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl


@triton.jit
def _tile(base, stride_b, b, step, pixels, ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
          UNIT: tl.constexpr):  # fmt: skip
    """Addresses of a tile and which of them are in the map. `UNIT` divides all strides, and tells the compiler."""
    p, c = step * P + tl.arange(0, P), tl.arange(0, BLOCK)
    line = base + b.to(tl.int64) * (stride_b // UNIT) * UNIT
    keep = (p < pixels)[:, None] & (c < C)[None, :]
    p = p.to(tl.int64)
    if ROWS:
        return line + (p[:, None] * C + c[None, :]), keep
    return line + (p[:, None] + c[None, :] * ((pixels.to(tl.int64) // UNIT) * UNIT)), keep


@triton.jit
def _share(pixels, SPLIT: tl.constexpr, P: tl.constexpr):
    """Sample, number and range of tiles of this program."""
    program = tl.program_id(0)
    b, part = program // SPLIT, program % SPLIT
    tiles = tl.cdiv(pixels, P)
    each = tl.cdiv(tiles, SPLIT)
    return b, part, part * each, tl.minimum((part + 1) * each, tiles)


@triton.jit
def _statistics(partials, b, pixels, SPLIT: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Mean and summed squared deviation of a sample from those of its programs."""
    part = tl.arange(0, SPLIT)
    tiles = tl.cdiv(pixels, P)
    each = tl.cdiv(tiles, SPLIT)
    first, last = tl.minimum(part * each * P, pixels), tl.minimum((part + 1) * each * P, pixels)
    line = partials + (b * SPLIT + part) * 2
    mean, spread = tl.load(line), tl.load(line + 1)
    count = (last - first).to(mean.dtype) * C
    total = pixels.to(mean.dtype) * C
    middle = tl.sum(count * mean) / total
    return middle, tl.sum(spread + count * (mean - middle) * (mean - middle)), total


@triton.jit(do_not_specialize=("x_b", "pixels"))
def norm_moments_kernel(
    x, bias, partials, x_b, pixels, X_ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and summed squared deviation of x + bias over a program's tiles: partials `(B, SPLIT, 2)`."""
    b, part, first, last = _share(pixels, SPLIT, P)
    c = tl.arange(0, BLOCK)
    own = tl.load(bias + c, mask=c < C, other=0).to(ACC)[None, :]
    at, keep = _tile(x, x_b, b, first, pixels, X_ROWS, C, P, BLOCK, UNIT)
    value = tl.where(keep, tl.load(at, mask=keep, other=0).to(ACC) + own, 0.0)
    # Deviations from the mean of the first tile: no difference of large squares.
    about = tl.sum(value) / tl.maximum(tl.sum(keep.to(ACC)), 1.0)
    total, square, count = tl.zeros([P, BLOCK], ACC), tl.zeros([P, BLOCK], ACC), tl.zeros([P, BLOCK], ACC)
    for step in range(first, last):
        at, keep = _tile(x, x_b, b, step, pixels, X_ROWS, C, P, BLOCK, UNIT)
        away = tl.where(keep, tl.load(at, mask=keep, other=0).to(ACC) + own - about, 0.0)
        total, square, count = total + away, square + away * away, count + keep.to(ACC)
    number, off = tl.maximum(tl.sum(count), 1.0), tl.sum(total)
    mean, spread = about + off / number, tl.maximum(tl.sum(square) - off * off / number, 0.0)
    line = partials + (b * SPLIT + part) * 2
    tl.store(line, mean)
    tl.store(line + 1, spread)


@triton.jit(do_not_specialize=("x_b", "pixels", "eps"))
def norm_apply_kernel(
    x, bias, weight, shift, partials, y, statistics, x_b, pixels, eps: tl.int64,
    X_ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y, in rows, and statistics `(B, 2)`: the mean and one over the deviation."""
    b, part, first, last = _share(pixels, SPLIT, P)
    mean, spread, total = _statistics(partials, b, pixels, SPLIT, C, P)
    least = eps.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
    over = 1 / tl.sqrt(spread / total + least)
    if part == 0:
        tl.store(statistics + 2 * b, mean)
        tl.store(statistics + 2 * b + 1, over)
    c = tl.arange(0, BLOCK)
    scale = over * tl.load(weight + c, mask=c < C, other=0).to(ACC)
    own, moved = tl.load(bias + c, mask=c < C, other=0).to(ACC), tl.load(shift + c, mask=c < C, other=0).to(ACC)
    for step in range(first, last):
        at, keep = _tile(x, x_b, b, step, pixels, X_ROWS, C, P, BLOCK, UNIT)
        value = tl.load(at, mask=keep, other=0).to(ACC) + own[None, :]
        to, inside = _tile(y, pixels.to(tl.int64) * C, b, step, pixels, True, C, P, BLOCK, UNIT)
        tl.store(to, ((value - mean) * scale[None, :] + moved[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _standard(x, bias, statistics, x_b, b, step, pixels, X_ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
              BLOCK: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """A tile of x + bias, normalised; 0 outside."""
    c = tl.arange(0, BLOCK)
    own = tl.load(bias + c, mask=c < C, other=0).to(ACC)[None, :]
    at, keep = _tile(x, x_b, b, step, pixels, X_ROWS, C, P, BLOCK, UNIT)
    value = tl.load(at, mask=keep, other=0).to(ACC) + own
    return tl.where(keep, (value - tl.load(statistics + 2 * b)) * tl.load(statistics + 2 * b + 1), 0.0)


@triton.jit(do_not_specialize=("x_b", "g_b", "pixels"))
def norm_sums_kernel(
    grad, x, bias, statistics, partials, x_b, g_b, pixels,
    X_ROWS: tl.constexpr, G_ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """By channel, with h the normalised map: sums of g, g h and h over a program's tiles, `(B, SPLIT, 3, C)`."""
    b, part, first, last = _share(pixels, SPLIT, P)
    of_g, of_gh, of_h = tl.zeros([P, BLOCK], ACC), tl.zeros([P, BLOCK], ACC), tl.zeros([P, BLOCK], ACC)
    for step in range(first, last):
        h = _standard(x, bias, statistics, x_b, b, step, pixels, X_ROWS, C, P, BLOCK, UNIT, ACC)
        at, keep = _tile(grad, g_b, b, step, pixels, G_ROWS, C, P, BLOCK, UNIT)
        g = tl.load(at, mask=keep, other=0).to(ACC)
        of_g, of_gh, of_h = of_g + g, of_gh + g * h, of_h + h
    c = tl.arange(0, BLOCK)
    line = partials + (b * SPLIT + part) * (3 * C) + c
    tl.store(line, tl.sum(of_g, 0), mask=c < C)
    tl.store(line + C, tl.sum(of_gh, 0), mask=c < C)
    tl.store(line + 2 * C, tl.sum(of_h, 0), mask=c < C)


@triton.jit
def _pulls(weight, sums, b, pixels, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """By channel weight, sums of g, g h and h; the means of weight g and weight g h over the sample."""
    c = tl.arange(0, BLOCK)
    w, line = tl.load(weight + c, mask=c < C, other=0).to(ACC), sums + b * (3 * C) + c
    g, gh = tl.load(line, mask=c < C, other=0), tl.load(line + C, mask=c < C, other=0)
    h = tl.load(line + 2 * C, mask=c < C, other=0)
    total = pixels.to(ACC) * C
    return w, g, gh, h, tl.sum(w * g) / total, tl.sum(w * gh) / total


@triton.jit(do_not_specialize=("x_b", "g_b", "pixels"))
def norm_backward_kernel(
    grad, x, bias, weight, statistics, sums, dx, x_b, g_b, pixels,
    X_ROWS: tl.constexpr, G_ROWS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, in the layout of x; sums `(B, 3, C)` of g, g h and h."""
    b, _part, first, last = _share(pixels, SPLIT, P)
    w, _g, _gh, _h, mean_g, mean_gh = _pulls(weight, sums, b, pixels, C, BLOCK, ACC)
    over = tl.load(statistics + 2 * b + 1)
    for step in range(first, last):
        h = _standard(x, bias, statistics, x_b, b, step, pixels, X_ROWS, C, P, BLOCK, UNIT, ACC)
        at, keep = _tile(grad, g_b, b, step, pixels, G_ROWS, C, P, BLOCK, UNIT)
        g = tl.load(at, mask=keep, other=0).to(ACC)
        to, inside = _tile(dx, pixels.to(tl.int64) * C, b, step, pixels, X_ROWS, C, P, BLOCK, UNIT)
        tl.store(to, (over * (w[None, :] * g - mean_g - h * mean_gh)).to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("batch", "pixels"))
def norm_parameters_kernel(
    weight, statistics, sums, out, batch, pixels, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Gradients of bias, weight and shift, out `(3, C)`; one program."""
    c = tl.arange(0, BLOCK)
    d_bias, d_weight, d_shift = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for b in range(0, batch):
        w, g, gh, h, mean_g, mean_gh = _pulls(weight, sums, b, pixels, C, BLOCK, ACC)
        over = tl.load(statistics + 2 * b + 1)
        d_bias += over * (w * g - pixels.to(ACC) * mean_g - h * mean_gh)
        d_weight, d_shift = d_weight + gh, d_shift + g
    tl.store(out + c, d_bias, mask=c < C)
    tl.store(out + C + c, d_weight, mask=c < C)
    tl.store(out + 2 * C + c, d_shift, mask=c < C)
