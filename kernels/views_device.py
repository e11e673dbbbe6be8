"""The Triton kernels of view a's appearance (SPEC 5): crop, noise, blur, contrast, brightness, in-painting.

What `place` takes for samples are the channels of all samples: b is sample times channels plus channel. `drawn` holds
`WIDTH` numbers a sample: its counter (bits of an int32), standard deviation of the noise, change of the contrast, shift
of the brightness, boxes (first pixel and one past the last, by axis), weights of the blur. Dense random numbers are
those of `coverfast.philox`: word `e % 4` of counter `(e // 4, sample, iteration, stream)` for element e of a sample.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

from coverfast.kernels.field_device import place

HALF_PI = tl.constexpr(1.5707963267948966)
TO_UNIT = tl.constexpr(2.0**-24)


@triton.jit
def _words(seed, element, sample, iteration, STREAM: tl.constexpr):
    block = (element // 4).to(tl.int32)
    nothing = block * 0
    return tl.philox(seed.to(tl.int64), block, nothing + sample, nothing + iteration, nothing + STREAM)


@triton.jit
def _unit(word):
    """In [0, 1), from the upper 24 bits."""
    return (word >> 8).to(tl.float32) * TO_UNIT


@triton.jit
def _wave(turn, odd):
    """cos(2 pi turn), or sin where `odd`, for turns in [0, 1).

    The library's functions keep a table on the stack for large angles. A quarter turn is taken off exactly; the series
    to the ninth power leave 3e-9 on the remaining eighth.
    """
    quarters = tl.floor(turn * 4 + 0.5)
    angle = (turn * 4 - quarters) * HALF_PI
    square = angle * angle
    sine = angle * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    at = quarters.to(tl.int32) + odd.to(tl.int32) * 3  # sin lags cos by a quarter
    value = tl.where(at % 2 == 0, cosine, sine)
    return tl.where((at % 4 == 1) | (at % 4 == 2), -value, value)


@triton.jit
def _normal(seed, element, sample, iteration, STREAM: tl.constexpr):
    """Standard normal, by Box-Muller from the pair of words that the element belongs to."""
    w_0, w_1, w_2, w_3 = _words(seed, element, sample, iteration, STREAM)
    late, odd = (element // 2) % 2 == 1, element % 2 == 1
    u, v = _unit(tl.where(late, w_2, w_0)), _unit(tl.where(late, w_3, w_1))
    return tl.sqrt(-2 * tl.log(1 - u)) * _wave(v, odd)


@triton.jit
def _uniform(seed, element, sample, iteration, STREAM: tl.constexpr):
    w_0, w_1, w_2, w_3 = _words(seed, element, sample, iteration, STREAM)
    at = element % 4
    return _unit(tl.where(at == 0, w_0, tl.where(at == 1, w_1, tl.where(at == 2, w_2, w_3))))


@triton.jit
def _pixels(
    source, numbers, drawn, i_b, i_c, i_z, i_y, i_x, from_z, from_y, from_x, size_z, size_y, size_x, channels, seed,
    iteration, NDIM: tl.constexpr, WIDTH: tl.constexpr, STREAM: tl.constexpr, NOISE: tl.constexpr,
    WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Pixels of the crop, noise added: place, element of its sample, what it belongs to, value.

    `NOISE` reads images at the crop's origin, zeros outside; otherwise `source` is the noisy crop already.
    """
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    sample, channel = b // channels, b % channels
    line = drawn + sample * WIDTH
    counter = tl.load(line).to(tl.int32, bitcast=True)
    element = ((channel * size_z + z) * size_y + y) * size_x + x
    if NOISE:
        origin = numbers + sample * (NDIM * (NDIM + 3)) + NDIM + 2
        at_y = y + tl.load(origin + (NDIM - 2) * (NDIM + 3)).to(y.dtype)
        at_x = x + tl.load(origin + (NDIM - 1) * (NDIM + 3)).to(x.dtype)
        inside = keep & (at_y >= 0) & (at_y < from_y) & (at_x >= 0) & (at_x < from_x)
        here = source + sample * i_b + channel * i_c
        if NDIM == 3:
            at_z = z + tl.load(origin).to(z.dtype)
            inside = inside & (at_z >= 0) & (at_z < from_z)
            here += at_z.to(tl.int64) * i_z
        value = tl.load(here + (at_y * i_y + at_x * i_x), mask=inside, other=0).to(tl.float32)
        value += tl.load(line + 1) * _normal(seed, element, counter, iteration, STREAM)
    else:
        line_of_sample = source + sample * (channels.to(tl.int64) * size_z * size_y * size_x)
        value = tl.load(line_of_sample + element, mask=keep, other=0)
    return (b, z, y, x, keep), element, (line, sample, counter), value


@triton.jit(
    do_not_specialize=(
        "i_b", "i_c", "i_z", "i_y", "i_x", "from_z", "from_y", "from_x", "size_z", "size_y", "size_x", "channels",
        "seed", "iteration",
    )
)  # fmt: skip
def view_sums_kernel(
    source, numbers, drawn, partials, i_b, i_c, i_z, i_y, i_x, from_z, from_y, from_x, size_z, size_y, size_x,
    channels, seed: tl.int64, iteration,
    NDIM: tl.constexpr, WIDTH: tl.constexpr, STREAM: tl.constexpr, NOISE: tl.constexpr, WIDE: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """The sum of each program's pixels: partials `(B * C, programs of a channel)`."""
    place_, _, _, value = _pixels(
        source, numbers, drawn, i_b, i_c, i_z, i_y, i_x, from_z, from_y, from_x, size_z, size_y, size_x, channels,
        seed, iteration, NDIM, WIDTH, STREAM, NOISE, WIDE, TILE_Y, TILE_X,
    )  # fmt: skip
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(place_[4], value, 0.0)))


@triton.jit(do_not_specialize=("count", "pixels"))
def view_means_kernel(partials, means, count, pixels, BLOCK: tl.constexpr):
    """The mean of each channel, its sums added in one order whatever the batch: means `(B * C,)`."""
    row = tl.program_id(0)
    line = partials + row.to(tl.int64) * count
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(line + at, mask=at < count, other=0)
    tl.store(means + row, tl.sum(total) / pixels)


@triton.jit(
    do_not_specialize=(
        "i_b", "i_c", "i_z", "i_y", "i_x", "from_z", "from_y", "from_x", "size_z", "size_y", "size_x", "channels",
        "seed", "iteration", "boxes",
    )
)  # fmt: skip
def view_appearance_kernel(
    source, numbers, drawn, means, out, i_b, i_c, i_z, i_y, i_x, from_z, from_y, from_x, size_z, size_y, size_x,
    channels, seed: tl.int64, iteration, boxes,
    NDIM: tl.constexpr, WIDTH: tl.constexpr, STREAM: tl.constexpr, FILL: tl.constexpr, NOISE: tl.constexpr,
    ADJUST: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Fill out `(B, C, *S)`, contiguous: the noisy crop, and with `ADJUST` contrast, brightness and in-painting."""
    place_, element, of, value = _pixels(
        source, numbers, drawn, i_b, i_c, i_z, i_y, i_x, from_z, from_y, from_x, size_z, size_y, size_x, channels,
        seed, iteration, NDIM, WIDTH, STREAM, NOISE, WIDE, TILE_Y, TILE_X,
    )  # fmt: skip
    b, z, y, x, keep = place_
    line, sample, counter = of
    if ADJUST:
        value += tl.load(line + 2) * (value - tl.load(means + b))
        value += tl.load(line + 3)
        painted = keep & (x < 0)
        for box in range(0, boxes):
            first = line + 4 + box * (2 * NDIM)
            y_0, y_1 = tl.load(first + 2 * NDIM - 4).to(tl.int32), tl.load(first + 2 * NDIM - 3).to(tl.int32)
            x_0, x_1 = tl.load(first + 2 * NDIM - 2).to(tl.int32), tl.load(first + 2 * NDIM - 1).to(tl.int32)
            inside = (y >= y_0) & (y < y_1) & (x >= x_0) & (x < x_1)
            if NDIM == 3:
                z_0, z_1 = tl.load(first).to(tl.int32), tl.load(first + 1).to(tl.int32)
                inside = inside & (z >= z_0) & (z < z_1)
            painted = painted | inside
        if boxes > 0:
            value = tl.where(painted, _uniform(seed, element, counter, iteration, FILL), value)
    tl.store(out + sample * (channels.to(tl.int64) * size_z * size_y * size_x) + element, value, mask=keep)


@triton.jit(do_not_specialize=("length", "inner", "channels", "taps", "elements"))
def view_blur_kernel(
    x, weights, out, length, inner, channels, taps, elements, STRIDE: tl.constexpr, TILE: tl.constexpr
):
    """Blur one axis of x `(B, C, ..., length, inner)`, contiguous, edges repeated, by weights `(B, STRIDE)`."""
    tiles = tl.cdiv(elements, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)  # a channel of a sample
    at = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    keep = at < elements
    place_on, line = (at // inner) % length, x + row * elements
    total = tl.zeros([TILE], tl.float32)
    for tap in range(0, taps):
        moved = tl.minimum(tl.maximum(place_on + tap - taps // 2, 0), length - 1) - place_on
        weight = tl.load(weights + (row // channels) * STRIDE + tap)
        total += weight * tl.load(line + (at + moved * inner), mask=keep, other=0)
    tl.store(out + row * elements + at, total, mask=keep)
