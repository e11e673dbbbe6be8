"""The Triton kernels that fuse an affine map with a field (GVSL Eq. 12, SPEC 9): one pass over the pixels each way.

Both need where a pixel looks from the centre of the grid, `away(p) = p - c + dvf(p)`: the fused field is
`(A - I) away + t + dvf`, which the identity leaves exactly `dvf`, and the gradient of `A` is the sum of `grad away^T`.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

from coverfast.kernels.field_device import displacement, place


@triton.jit
def _away(psi, z, y, x, size_z, size_y, size_x):
    """Where pixels look, from the centre of the grid, along (z, y, x)."""
    pixel, sizes = (z, y, x), (size_z, size_y, size_x)
    away = ()
    for i in tl.static_range(3):
        kind = psi[i].dtype
        away += ((pixel[i].to(kind) - 0.5 * (sizes[i] - 1).to(kind)) + psi[i],)
    return away


@triton.jit(do_not_specialize=("d_b", "d_c", "d_z", "d_y", "d_x", "size_z", "size_y", "size_x"))
def fuse_forward_kernel(
    dvf, theta, out, d_b, d_c, d_z, d_y, d_x, size_z, size_y, size_x,
    NDIM: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Fill out `(B, n, *S)` from dvf `(B, n, *S)` and theta `(B, n, n + 1)`; out and theta contiguous."""
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    psi = displacement(dvf, d_b, d_c, d_z, d_y, d_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
    away = _away(psi, z, y, x, size_z, size_y, size_x)
    columns: tl.constexpr = NDIM + 1
    first: tl.constexpr = 3 - NDIM
    numbers = theta + b * (NDIM * columns)
    size = size_z.to(tl.int64) * size_y * size_x
    line = out + b * NDIM * size + z.to(tl.int64) * size_y * size_x + (y * size_x + x)
    for i in tl.static_range(NDIM):
        total = tl.load(numbers + i * columns + NDIM) + psi[first + i]
        for j in tl.static_range(NDIM):
            total += (tl.load(numbers + i * columns + j) - (1.0 if i == j else 0.0)) * away[first + j]
        tl.store(line + i * size, total, mask=keep)


@triton.jit(
    do_not_specialize=(
        "g_b", "g_c", "g_z", "g_y", "g_x", "d_b", "d_c", "d_z", "d_y", "d_x", "size_z", "size_y", "size_x",
    )
)  # fmt: skip
def fuse_backward_kernel(
    grad, dvf, theta, d_dvf, partials, g_b, g_c, g_z, g_y, g_x, d_b, d_c, d_z, d_y, d_x, size_z, size_y, size_x,
    NDIM: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, TO_DVF: tl.constexpr,
    TO_THETA: tl.constexpr,
):  # fmt: skip
    """Fill d_dvf `(B, n, *S)`, and of theta's gradient the sums over this program's pixels, partials
    `(programs, n, n + 1)`; all contiguous. What is not asked for is neither computed nor read.
    """
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    g = displacement(grad, g_b, g_c, g_z, g_y, g_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
    columns: tl.constexpr = NDIM + 1
    first: tl.constexpr = 3 - NDIM
    if TO_DVF:
        numbers = theta + b * (NDIM * columns)
        size = size_z.to(tl.int64) * size_y * size_x
        line = d_dvf + b * NDIM * size + z.to(tl.int64) * size_y * size_x + (y * size_x + x)
        for j in tl.static_range(NDIM):
            total = g[first + j]
            for i in tl.static_range(NDIM):
                total += (tl.load(numbers + i * columns + j) - (1.0 if i == j else 0.0)) * g[first + i]
            tl.store(line + j * size, total, mask=keep)
    if TO_THETA:
        psi = displacement(dvf, d_b, d_c, d_z, d_y, d_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
        away = _away(psi, z, y, x, size_z, size_y, size_x)
        sums = partials + tl.program_id(0).to(tl.int64) * (NDIM * columns)
        for i in tl.static_range(NDIM):  # gradients read as 0 where the tile leaves the grid
            for j in tl.static_range(NDIM):
                tl.store(sums + i * columns + j, tl.sum(g[first + i] * away[first + j]))
            tl.store(sums + i * columns + NDIM, tl.sum(g[first + i]))
