"""The three Triton kernels of MoV (SPEC 1): forward, gradient of the queries, gradient of the keys.

A program serves `ROWS` neighbouring rows along y of one tile along x. A lane is one pixel and one group; it holds the
queries (or keys) of its `ROWS` pixels and walks over the rows of the window, so that a row of keys is loaded once for
all of them. Maps are read as rows of channels: a tap is one contiguous load of `WIDTH` channels, its dot product is
summed inside the lane. Rows out of the grid are never visited; taps out of it along x are loaded as zeros. 2D maps
are 3D maps with one plane and radius 0 along z.

Names: b sample, z y x pixel, j group, o offset along x; T lanes, `(TILE, LANES)` of (pixel, group) flattened; scores
and log-sum-exp are in base 2, the factor log2(e) folded into the queries. Arithmetic in `ACC`; addresses of rows in
64 bits; strides of rows in units of `UNIT` elements, which tells the compiler how they are aligned.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(size_z, size_y, size_x, ROWS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """Sample, plane, first row and first column of this program; x `(T,)` and j `(T,)` of its lanes."""
    tiles = tl.cdiv(size_x, TILE)
    blocks = tl.cdiv(size_y, ROWS)
    program = tl.program_id(0)
    first_x = (program % tiles) * TILE
    program = program // tiles
    first_y = (program % blocks) * ROWS
    program = program // blocks
    z = program % size_z
    b = (program // size_z).to(tl.int64)
    lane = tl.arange(0, TILE * LANES)
    x = first_x + lane // LANES
    if WIDE:
        x = x.to(tl.int64)
    return b, z, first_y, first_x, x, lane % LANES


@triton.jit
def _factor(bits):
    """A float64 handed over as its bits: Triton would pass a Python float as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _line(base, b, z, y, stride_b, stride_z, stride_y, UNIT: tl.constexpr):
    return base + (b * stride_b + stride_z.to(tl.int64) * z + stride_y.to(tl.int64) * y) * UNIT


@triton.jit
def _along(x, j, X: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Where the first channels of a lane's pixel and group lie on their line, `(T, CHUNK)`; pixels are `X` apart."""
    return (x * X + tl.minimum(j, GROUPS - 1) * WIDTH)[:, None] + tl.arange(0, CHUNK)[None, :]


@triton.jit
def _load_rows(rows, keep, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """`WIDTH` channels of T pixels, zeros where `keep` is false, as a tuple of `(T, CHUNK)` tiles in `ACC`.

    A chunk is what one load instruction brings to one lane: a wider tile would be spread over several lanes.
    """
    columns = tl.arange(0, CHUNK)
    chunks = ()
    for first in tl.static_range(0, WIDTH, CHUNK):
        mask = keep[:, None]
        if first + CHUNK > WIDTH:
            mask = mask & (first + columns < WIDTH)[None, :]
        chunks += (tl.load(rows + first, mask=mask, other=0).to(ACC),)
    return chunks


@triton.jit
def _store_rows(rows, stride_c, chunks, keep, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    columns = tl.arange(0, CHUNK)
    for c in tl.static_range(len(chunks)):
        mask = keep[:, None]
        if (c + 1) * CHUNK > WIDTH:
            mask = mask & (c * CHUNK + columns < WIDTH)[None, :]
        tl.store(rows + c * CHUNK * stride_c, chunks[c].to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _times(chunks, factor):
    scaled = ()
    for c in tl.static_range(len(chunks)):
        scaled += (chunks[c] * factor,)
    return scaled


@triton.jit
def _plus_times(totals, weight, chunks):
    """`totals + weight * chunks`, weight `(T,)`."""
    sums = ()
    for c in tl.static_range(len(chunks)):
        sums += (totals[c] + weight[:, None] * chunks[c],)
    return sums


@triton.jit
def _zeros(chunks):
    zeros = ()
    for c in tl.static_range(len(chunks)):
        zeros += (tl.zeros_like(chunks[c]),)
    return zeros


@triton.jit
def _dot(a, b):
    product = a[0] * b[0]
    for c in tl.static_range(1, len(a)):
        product += a[c] * b[c]
    return tl.sum(product, 1)


@triton.jit
def _reached(x, o, size_x, radius_x):
    """Lanes whose neighbour at offset o is in the grid and in the window; o is at least `-radius_x`."""
    # As unsigned numbers, those below 0 are above any size: one comparison instead of two.
    end = tl.where(o <= radius_x, size_x, 0).to(tl.uint32)
    return (x + o).to(tl.uint64 if x.dtype == tl.int64 else tl.uint32) < end


@triton.jit
def _load_keys(
    line, x, first, size_x, radius_x, K_X: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The keys of `COUNT` taps from offset `first` along x, zeros out of the grid."""
    keys = ()
    for t in tl.static_range(COUNT):
        keep = _reached(x, first + t, size_x, radius_x)
        keys += (_load_rows(line + (first + t) * K_X, keep, WIDTH, CHUNK, ACC),)
    return keys


# --- forward ---------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    states, queries, line, x, first, offset_z, y, first_y, size_x, radius_y, radius_x, K_X: tl.constexpr,
    NDIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One pass: `COUNT` taps from offset `first` of one row of keys, for every query whose window holds that row.

    A state is `(top, total, sum of weights times offset z, y, x)` of the softmax so far, rescaled once a pass.
    """
    keys = _load_keys(line, x, first, size_x, radius_x, K_X, WIDTH, CHUNK, COUNT, ACC)
    updated = ()
    for i in tl.static_range(len(queries)):
        state = states[i]
        offset_y = y - (first_y + i)
        if tl.abs(offset_y) <= radius_y:
            old, total, moved_z, moved_y, moved_x = state
            scores = ()
            top = old
            for t in tl.static_range(COUNT):
                keep = _reached(x, first + t, size_x, radius_x)
                score = tl.where(keep, _dot(queries[i], keys[t]), -float("inf"))
                top = tl.maximum(top, score)
                scores += (score,)
            row = tl.exp2(scores[0] - top)
            row_x = row * first
            for t in tl.static_range(1, COUNT):
                weight = tl.exp2(scores[t] - top)
                row += weight
                row_x += weight * (first + t)
            shrink = tl.exp2(old - top)
            total = total * shrink + row
            if NDIM == 3:
                moved_z = moved_z * shrink + row * offset_z.to(ACC)
            moved_y = moved_y * shrink + row * offset_y.to(ACC)
            moved_x = moved_x * shrink + row_x
            state = (top, total, moved_z, moved_y, moved_x)
        updated += (state,)
    return updated


@triton.jit(
    do_not_specialize=(
        "q_b", "q_z", "q_y", "k_b", "k_z", "k_y", "size_z", "size_y", "size_x", "radius_z", "radius_y", "radius_x",
        "scale",
    )
)  # fmt: skip
def mov_forward_kernel(
    q, k, out, lse, vectors,
    q_b, q_z, q_y, k_b, k_z, k_y, size_z, size_y, size_x, radius_z, radius_y, radius_x, scale: tl.int64,
    NDIM: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, TOP: tl.constexpr,
    Q_X: tl.constexpr, K_X: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    WINDOW_X: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Fill out `(B, n, *S)`, lse `(B, J, *S)` and, for several groups, vectors `(B, J, n, *S)`.

    `WINDOW_X` is the window along x when its taps are unrolled, 0 when they are a loop.
    """
    b, z, first_y, first_x, x, j = _place(size_z, size_y, size_x, ROWS, TILE, LANES, WIDE)
    at_q, at_k = _along(x, j, Q_X, GROUPS, WIDTH, CHUNK), _along(x, j, K_X, GROUPS, WIDTH, CHUNK)
    inside, factor = x < size_x, _factor(scale) * LOG2E
    zero = tl.zeros([TILE * LANES], ACC)
    queries, states = (), ()
    for i in tl.static_range(ROWS):
        y = tl.minimum(first_y + i, size_y - 1)
        own = _load_rows(_line(q, b, z, y, q_b, q_z, q_y, UNIT) + at_q, inside, WIDTH, CHUNK, ACC)
        queries += (_times(own, factor.to(ACC)),)
        # The lowest finite number, not minus infinity: a pass wholly out of the grid leaves it as it is, without NaN.
        states += ((zero + TOP, zero, zero, zero, zero),)
    for key_z in range(tl.maximum(z - radius_z, 0), tl.minimum(z + radius_z, size_z - 1) + 1):
        low, high = tl.maximum(first_y - radius_y, 0), tl.minimum(first_y + (ROWS - 1) + radius_y, size_y - 1)
        for key_y in range(low, high + 1):
            line = _line(k, b, key_z, key_y, k_b, k_z, k_y, UNIT) + at_k
            if WINDOW_X > 0:
                for t in tl.static_range(0, WINDOW_X, TAPS):
                    states = _attend(
                        states, queries, line, x, t - WINDOW_X // 2, key_z - z, key_y, first_y, size_x, radius_y,
                        WINDOW_X // 2, K_X, NDIM, WIDTH, CHUNK, min(TAPS, WINDOW_X - t), ACC,
                    )  # fmt: skip
            else:
                left = tl.maximum(-radius_x, -(first_x + TILE - 1)).to(x.dtype)
                right = tl.minimum(radius_x, size_x - 1 - first_x).to(x.dtype)
                for first in range(left, right + 1, TAPS):
                    states = _attend(
                        states, queries, line, x, first, key_z - z, key_y, first_y, size_x, radius_y, radius_x, K_X,
                        NDIM, WIDTH, CHUNK, TAPS, ACC,
                    )  # fmt: skip
    size = size_z.to(tl.int64) * size_y * size_x
    columns_x = first_x + tl.arange(0, TILE)
    for i in tl.static_range(ROWS):
        y = first_y + i
        line = (size_y.to(tl.int64) * z + y) * size_x
        # No lane of a row below the grid. (Masks of lanes alone: Triton 3.9 interprets `lanes & scalar` wrongly.)
        end = tl.where(y < size_y, size_x, 0)
        keep = (x < end) & (j < GROUPS)
        top, total, moved_z, moved_y, moved_x = states[i]
        total = tl.maximum(total, 1.0)  # as it is for every pixel of the grid, whose best tap weighs 1
        tl.store(lse + (b * GROUPS + j) * size + line + x, top + tl.log2(total), mask=keep)
        moved = (moved_z, moved_y, moved_x)
        for axis in tl.static_range(3 - NDIM, 3):
            c = axis - (3 - NDIM)
            vector = moved[axis] / total
            if GROUPS > 1:
                tl.store(vectors + ((b * GROUPS + j) * NDIM + c) * size + line + x, vector, mask=keep)
            mean = tl.sum(tl.reshape(tl.where(j < GROUPS, vector, 0.0), [TILE, LANES]), 1) / GROUPS
            tl.store(out + (b * NDIM + c) * size + line + columns_x, mean, mask=columns_x < end)


# --- gradient of the queries -----------------------------------------------------------------------------------
# With g the gradient of the output and v a group's vector, ds(p, o) = w(p, o) * g(p) . (o - v(p)) / J and
# dq(p) = scale * sum over o of ds(p, o) k(p + o). The weight is made again from the log-sum-exp. A tap out of the grid
# needs no mask of its own: its key was loaded as zero, and its weight is finite because the exponent is clamped at 0,
# where it mathematically belongs.


@triton.jit
def _gather_keys(
    totals, queries, sides, line, x, first, offset_z, y, first_y, size_x, radius_y, radius_x, K_X: tl.constexpr,
    NDIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One pass of `mov_dq_kernel`; a side is `(lse, g . v, g along z, y, x)` of the query."""
    keys = _load_keys(line, x, first, size_x, radius_x, K_X, WIDTH, CHUNK, COUNT, ACC)
    updated = ()
    for i in tl.static_range(len(queries)):
        total = totals[i]
        offset_y = y - (first_y + i)
        if tl.abs(offset_y) <= radius_y:
            level, pulled, g_z, g_y, g_x = sides[i]
            pull = g_y * offset_y.to(ACC) - pulled
            if NDIM == 3:
                pull += g_z * offset_z.to(ACC)
            for t in tl.static_range(COUNT):
                weight = tl.exp2(tl.minimum(_dot(queries[i], keys[t]) - level, 0.0))
                total = _plus_times(total, weight * (pull + g_x * (first + t)), keys[t])
        updated += (total,)
    return updated


@triton.jit(
    do_not_specialize=(
        "q_b", "q_z", "q_y", "k_b", "k_z", "k_y", "d_b", "d_z", "d_y", "d_c", "g_b", "g_c", "g_z", "g_y", "size_z",
        "size_y", "size_x", "radius_z", "radius_y", "radius_x", "scale",
    ),
    do_not_specialize_on_alignment=("g_x",),
)  # fmt: skip
def mov_dq_kernel(
    q, k, lse, vectors, grad, dq, pulled,
    q_b, q_z, q_y, k_b, k_z, k_y, d_b, d_z, d_y, d_c, g_b, g_c, g_z, g_y, g_x,
    size_z, size_y, size_x, radius_z, radius_y, radius_x, scale: tl.int64,
    NDIM: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
    Q_X: tl.constexpr, K_X: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    D_X: tl.constexpr, D_UNIT: tl.constexpr, D_ROWS: tl.constexpr,
    WINDOW_X: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dq, and on the way `pulled` `(B, J, *S)`: g . v of each query and group, which `mov_dk_kernel` reads."""
    b, z, first_y, first_x, x, j = _place(size_z, size_y, size_x, ROWS, TILE, LANES, WIDE)
    at_q, at_k = _along(x, j, Q_X, GROUPS, WIDTH, CHUNK), _along(x, j, K_X, GROUPS, WIDTH, CHUNK)
    inside, factor, g_c = x < size_x, _factor(scale), g_c.to(tl.int64)
    size = size_z.to(tl.int64) * size_y * size_x
    queries, sides, totals = (), (), ()
    for i in tl.static_range(ROWS):
        y = tl.minimum(first_y + i, size_y - 1)
        own = _load_rows(_line(q, b, z, y, q_b, q_z, q_y, UNIT) + at_q, inside, WIDTH, CHUNK, ACC)
        queries += (_times(own, (factor * LOG2E).to(ACC)),)
        totals += (_zeros(own),)
        place = (b * GROUPS + tl.minimum(j, GROUPS - 1)) * size + (size_y.to(tl.int64) * z + y) * size_x + x
        vector = vectors + (b * GROUPS + tl.minimum(j, GROUPS - 1)) * (NDIM - 1) * size + place
        slope = _line(grad, b, z, y, g_b, g_z, g_y, 1) + x * g_x
        g_of_z, dot = tl.zeros([TILE * LANES], ACC), tl.zeros([TILE * LANES], ACC)
        if NDIM == 3:
            g_of_z = tl.load(slope, mask=inside, other=0)
            dot = g_of_z * tl.load(vector, mask=inside, other=0)
        g_of_y = tl.load(slope + (NDIM - 2) * g_c, mask=inside, other=0)
        g_of_x = tl.load(slope + (NDIM - 1) * g_c, mask=inside, other=0)
        dot += g_of_y * tl.load(vector + (NDIM - 2) * size, mask=inside, other=0)
        dot += g_of_x * tl.load(vector + (NDIM - 1) * size, mask=inside, other=0)
        end = tl.where(first_y + i < size_y, size_x, 0)
        tl.store(pulled + place, dot, mask=(x < end) & (j < GROUPS))
        sides += ((tl.load(lse + place, mask=inside, other=0), dot, g_of_z, g_of_y, g_of_x),)
    for key_z in range(tl.maximum(z - radius_z, 0), tl.minimum(z + radius_z, size_z - 1) + 1):
        low, high = tl.maximum(first_y - radius_y, 0), tl.minimum(first_y + (ROWS - 1) + radius_y, size_y - 1)
        for key_y in range(low, high + 1):
            line = _line(k, b, key_z, key_y, k_b, k_z, k_y, UNIT) + at_k
            if WINDOW_X > 0:
                for t in tl.static_range(0, WINDOW_X, TAPS):
                    totals = _gather_keys(
                        totals, queries, sides, line, x, t - WINDOW_X // 2, key_z - z, key_y, first_y, size_x,
                        radius_y, WINDOW_X // 2, K_X, NDIM, WIDTH, CHUNK, min(TAPS, WINDOW_X - t), ACC,
                    )  # fmt: skip
            else:
                left = tl.maximum(-radius_x, -(first_x + TILE - 1)).to(x.dtype)
                right = tl.minimum(radius_x, size_x - 1 - first_x).to(x.dtype)
                for first in range(left, right + 1, TAPS):
                    totals = _gather_keys(
                        totals, queries, sides, line, x, first, key_z - z, key_y, first_y, size_x, radius_y, radius_x,
                        K_X, NDIM, WIDTH, CHUNK, TAPS, ACC,
                    )  # fmt: skip
    _store_gradient(
        dq, totals, (factor / GROUPS).to(ACC), b, z, first_y, x, j, size_y, size_x, d_b, d_z, d_y, d_c,
        GROUPS, WIDTH, CHUNK, D_X, D_UNIT, D_ROWS,
    )  # fmt: skip


@triton.jit
def _store_gradient(
    base, totals, factor, b, z, first_y, x, j, size_y, size_x, d_b, d_z, d_y, d_c, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, D_X: tl.constexpr, D_UNIT: tl.constexpr, D_ROWS: tl.constexpr,
):  # fmt: skip
    """`totals * factor` of every row, to channels that are contiguous (`D_ROWS`) or `d_c` apart."""
    columns = tl.arange(0, CHUNK)[None, :]
    for i in tl.static_range(len(totals)):
        y = first_y + i
        keep = (x < tl.where(y < size_y, size_x, 0)) & (j < GROUPS)
        line = _line(base, b, z, y, d_b, d_z, d_y, D_UNIT)
        if D_ROWS:
            rows = line + ((x * D_X + j * WIDTH)[:, None] + columns)
            _store_rows(rows, 1, _times(totals[i], factor), keep, WIDTH, CHUNK)
        else:
            rows = line + ((x * D_X)[:, None] + ((j * WIDTH)[:, None] + columns).to(tl.int64) * d_c)
            _store_rows(rows, tl.cast(d_c, tl.int64), _times(totals[i], factor), keep, WIDTH, CHUNK)


# --- gradient of the keys --------------------------------------------------------------------------------------
# The queries that see a key are those in the mirrored window around it, so this is a gather too: no atomics, and the
# same bits on every run. dk(p) = scale * sum over o of ds(p - o, o) q(p - o).


@triton.jit
def _load_query(
    line, levels, pulls, slopes, g_c, g_x, x, o, offset_z, size_x, radius_x, Q_X: tl.constexpr, NDIM: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The query at offset `o` along x as `(channels, lse, pull of the key without g along y, g along y)`.

    `o` is an argument: in a local variable an unrolled offset would be 32 bits wide, and its products with it.
    """
    keep = _reached(x, o, size_x, radius_x)
    row = _load_rows(line + o * Q_X, keep, WIDTH, CHUNK, ACC)
    slope = slopes + o * tl.cast(g_x, x.dtype)
    level = tl.load(levels + o, mask=keep, other=0)
    pull = tl.load(slope + (NDIM - 1) * g_c, mask=keep, other=0) * (-o) - tl.load(pulls + o, mask=keep, other=0)
    if NDIM == 3:
        pull += tl.load(slope, mask=keep, other=0) * offset_z.to(ACC)
    return row, level, pull, tl.load(slope + (NDIM - 2) * g_c, mask=keep, other=0)


@triton.jit
def _gather_queries(
    totals, keys, line, levels, pulls, slopes, g_c, g_x, x, first, offset_z, y, first_y, size_x, radius_y, radius_x,
    Q_X: tl.constexpr, NDIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One pass of `mov_dk_kernel`: queries at `first + t` along x, which see the key at the opposite offset."""
    queries = ()
    for t in tl.static_range(COUNT):
        query = _load_query(
            line, levels, pulls, slopes, g_c, g_x, x, first + t, offset_z, size_x, radius_x, Q_X, NDIM, WIDTH, CHUNK,
            ACC,
        )  # fmt: skip
        queries += (query,)
    updated = ()
    for i in tl.static_range(len(keys)):
        total = totals[i]
        offset_y = (first_y + i) - y
        if tl.abs(offset_y) <= radius_y:
            for t in tl.static_range(COUNT):
                row, level, pull, g_y = queries[t]
                weight = tl.exp2(tl.minimum(_dot(row, keys[i]) - level, 0.0))
                total = _plus_times(total, weight * (pull + g_y * offset_y.to(ACC)), row)
        updated += (total,)
    return updated


@triton.jit(
    do_not_specialize=(
        "q_b", "q_z", "q_y", "k_b", "k_z", "k_y", "d_b", "d_z", "d_y", "d_c", "g_b", "g_c", "g_z", "g_y", "size_z",
        "size_y", "size_x", "radius_z", "radius_y", "radius_x", "scale",
    ),
    do_not_specialize_on_alignment=("g_x",),
)  # fmt: skip
def mov_dk_kernel(
    q, k, lse, pulled, grad, dk,
    q_b, q_z, q_y, k_b, k_z, k_y, d_b, d_z, d_y, d_c, g_b, g_c, g_z, g_y, g_x,
    size_z, size_y, size_x, radius_z, radius_y, radius_x, scale: tl.int64,
    NDIM: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
    Q_X: tl.constexpr, K_X: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
    D_X: tl.constexpr, D_UNIT: tl.constexpr, D_ROWS: tl.constexpr,
    WINDOW_X: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dk, from the queries, their log-sum-exp and their `pulled`."""
    b, z, first_y, first_x, x, j = _place(size_z, size_y, size_x, ROWS, TILE, LANES, WIDE)
    at_q, at_k = _along(x, j, Q_X, GROUPS, WIDTH, CHUNK), _along(x, j, K_X, GROUPS, WIDTH, CHUNK)
    inside, factor, g_c = x < size_x, _factor(scale), g_c.to(tl.int64)
    size = size_z.to(tl.int64) * size_y * size_x
    at_side = (b * GROUPS + tl.minimum(j, GROUPS - 1)) * size + x
    keys, totals = (), ()
    for i in tl.static_range(ROWS):
        y = tl.minimum(first_y + i, size_y - 1)
        own = _load_rows(_line(k, b, z, y, k_b, k_z, k_y, UNIT) + at_k, inside, WIDTH, CHUNK, ACC)
        keys += (_times(own, (factor * LOG2E).to(ACC)),)
        totals += (_zeros(own),)
    for query_z in range(tl.maximum(z - radius_z, 0), tl.minimum(z + radius_z, size_z - 1) + 1):
        low, high = tl.maximum(first_y - radius_y, 0), tl.minimum(first_y + (ROWS - 1) + radius_y, size_y - 1)
        for query_y in range(low, high + 1):
            line = _line(q, b, query_z, query_y, q_b, q_z, q_y, UNIT) + at_q
            slopes = _line(grad, b, query_z, query_y, g_b, g_z, g_y, 1) + x * g_x
            side = (size_y.to(tl.int64) * query_z + query_y) * size_x + at_side
            if WINDOW_X > 0:
                for t in tl.static_range(0, WINDOW_X, TAPS):
                    totals = _gather_queries(
                        totals, keys, line, lse + side, pulled + side, slopes, g_c, g_x, x, t - WINDOW_X // 2,
                        z - query_z, query_y, first_y, size_x, radius_y, WINDOW_X // 2, Q_X, NDIM, WIDTH, CHUNK,
                        min(TAPS, WINDOW_X - t), ACC,
                    )  # fmt: skip
            else:
                left = tl.maximum(-radius_x, -(first_x + TILE - 1)).to(x.dtype)
                right = tl.minimum(radius_x, size_x - 1 - first_x).to(x.dtype)
                for first in range(left, right + 1, TAPS):
                    totals = _gather_queries(
                        totals, keys, line, lse + side, pulled + side, slopes, g_c, g_x, x, first, z - query_z,
                        query_y, first_y, size_x, radius_y, radius_x, Q_X, NDIM, WIDTH, CHUNK, TAPS, ACC,
                    )  # fmt: skip
    _store_gradient(
        dk, totals, (factor / GROUPS).to(ACC), b, z, first_y, x, j, size_y, size_x, d_b, d_z, d_y, d_c,
        GROUPS, WIDTH, CHUNK, D_X, D_UNIT, D_ROWS,
    )  # fmt: skip
