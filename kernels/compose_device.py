"""The Triton kernels of composition (SPEC 3): the coarse field, up-sampled, looked up where the fine one points.

The forward never writes the up-sampled field. Along an axis two neighbouring fine pixels hang on three coarse ones at
most, so that a look-up between them is a weighted sum of `3^n` coarse vectors. The backward scatters to the fine grid,
8 instead of 27 additions a component, and gathers that into the coarse one (`upsample_backward_kernel`).
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

from coverfast.kernels.field_device import cell, displacement, place
from coverfast.kernels.warp_device import scatter


@triton.jit
def _taps(of):
    """Along an axis: the first of three coarse pixels around a cell of the fine grid, their weights, their slopes."""
    low, part, sloped = of
    # Fine 2c is a quarter of c - 1 and three of c, fine 2c + 1 three of c and one of c + 1.
    odd = low % 2 != 0
    first = tl.where(odd, low // 2, low // 2 - 1)
    nothing = part * 0
    weights = (
        tl.where(odd, 0.75 - 0.5 * part, 0.25 - 0.25 * part),
        tl.where(odd, 0.25 + 0.5 * part, nothing + 0.75),
        tl.where(odd, nothing, 0.25 * part),
    )
    sloped = sloped.to(part.dtype)
    slopes = (
        sloped * tl.where(odd, nothing - 0.5, nothing - 0.25),
        sloped * tl.where(odd, nothing + 0.5, nothing),
        sloped * tl.where(odd, nothing, nothing + 0.25),
    )
    return first, weights, slopes


@triton.jit
def _fine_cells(psi, z, y, x, size_z, size_y, size_x, WIDE: tl.constexpr):
    pixel, sizes = (z, y, x), (size_z, size_y, size_x)
    cells = ()
    for i in tl.static_range(3):
        cells += (cell(pixel[i].to(psi[i].dtype) + psi[i], sizes[i], WIDE, True),)
    return cells


@triton.jit
def _coarse_at(taps, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, c_z, c_y, c_x, size_z, size_y, size_x,
               NDIM: tl.constexpr):  # fmt: skip
    """Offset of one of the `3^n` coarse pixels, clamped to the grid."""
    i_y = tl.minimum(tl.maximum(taps[1][0] + TY, 0), size_y // 2 - 1)
    i_x = tl.minimum(tl.maximum(taps[2][0] + TX, 0), size_x // 2 - 1)
    at = i_y * c_y + i_x * c_x
    if NDIM == 3:
        at += tl.minimum(tl.maximum(taps[0][0] + TZ, 0), size_z // 2 - 1) * c_z
    return at


@triton.jit(
    do_not_specialize=(
        "f_b", "f_c", "f_z", "f_y", "f_x", "c_b", "c_c", "c_z", "c_y", "c_x", "size_z", "size_y", "size_x",
    )
)  # fmt: skip
def compose_forward_kernel(
    fine, coarse, out, f_b, f_c, f_z, f_y, f_x, c_b, c_c, c_z, c_y, c_x, size_z, size_y, size_x,
    NDIM: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Fill out `(B, n, *S)`, contiguous, from fine `(B, n, *S)` and coarse `(B, n, *S/2)`."""
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    psi = displacement(fine, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
    cells = _fine_cells(psi, z, y, x, size_z, size_y, size_x, WIDE)
    taps = (_taps(cells[0]), _taps(cells[1]), _taps(cells[2]))
    base, c_c = coarse + b * c_b, c_c.to(tl.int64)
    totals = (tl.zeros_like(psi[0]), tl.zeros_like(psi[0]), tl.zeros_like(psi[0]))
    for tz in tl.static_range(3 if NDIM == 3 else 1):
        for ty in tl.static_range(3):
            for tx in tl.static_range(3):
                weight = taps[1][1][ty] * taps[2][1][tx]
                if NDIM == 3:
                    weight = taps[0][1][tz] * weight
                at = _coarse_at(taps, tz, ty, tx, c_z, c_y, c_x, size_z, size_y, size_x, NDIM)
                mask = keep & (weight != 0)
                updated = ()
                for i in tl.static_range(3):
                    total = totals[i]
                    if i >= 3 - NDIM:
                        total += weight * tl.load(base + (i - (3 - NDIM)) * c_c + at, mask=mask, other=0)
                    updated += (total,)
                totals = updated
    size = size_z.to(tl.int64) * size_y * size_x
    line = out + b * NDIM * size + z.to(tl.int64) * size_y * size_x + (y * size_x + x)
    for i in tl.static_range(3 - NDIM, 3):
        tl.store(line + (i - (3 - NDIM)) * size, psi[i] + 2 * totals[i], mask=keep)


@triton.jit(
    do_not_specialize=(
        "g_b", "g_c", "g_z", "g_y", "g_x", "f_b", "f_c", "f_z", "f_y", "f_x", "c_b", "c_c", "c_z", "c_y", "c_x",
        "size_z", "size_y", "size_x",
    )
)  # fmt: skip
def compose_backward_kernel(
    grad, fine, coarse, d_fine, d_up, scale,
    g_b, g_c, g_z, g_y, g_x, f_b, f_c, f_z, f_y, f_x, c_b, c_c, c_z, c_y, c_x, size_z, size_y, size_x,
    NDIM: tl.constexpr, WIDE: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Fill d_fine and add to d_up (zeros before), both `(B, n, *S)` contiguous; d_up as `scatter` says."""
    b, z, y, x, _, keep = place(size_z, size_y, size_x, 1, TILE_Y, TILE_X, WIDE)
    psi = displacement(fine, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
    g = displacement(grad, g_b, g_c, g_z, g_y, g_x, b, z, y, x, keep, size_z, size_y, size_x, NDIM, "dense")
    cells = _fine_cells(psi, z, y, x, size_z, size_y, size_x, WIDE)
    taps = (_taps(cells[0]), _taps(cells[1]), _taps(cells[2]))
    base, c_c = coarse + b * c_b, c_c.to(tl.int64)
    d_z, d_y, d_x = tl.zeros_like(psi[0]), tl.zeros_like(psi[0]), tl.zeros_like(psi[0])
    for tz in tl.static_range(3 if NDIM == 3 else 1):
        for ty in tl.static_range(3):
            for tx in tl.static_range(3):
                at = _coarse_at(taps, tz, ty, tx, c_z, c_y, c_x, size_z, size_y, size_x, NDIM)
                pull = tl.zeros_like(psi[0])
                for i in tl.static_range(3 - NDIM, 3):
                    pull += g[i] * tl.load(base + (i - (3 - NDIM)) * c_c + at, mask=keep, other=0)
                w_y, w_x = taps[1][1][ty], taps[2][1][tx]
                s_y, s_x = taps[1][2][ty], taps[2][2][tx]
                if NDIM == 3:
                    d_z += taps[0][2][tz] * w_y * w_x * pull
                    pull *= taps[0][1][tz]
                d_y += s_y * w_x * pull
                d_x += w_y * s_x * pull
    slopes = (d_z, d_y, d_x)
    size = size_z.to(tl.int64) * size_y * size_x
    at = b * NDIM * size + z.to(tl.int64) * size_y * size_x + (y * size_x + x)
    for i in tl.static_range(3 - NDIM, 3):
        tl.store(d_fine + at + (i - (3 - NDIM)) * size, g[i] + 2 * slopes[i], mask=keep)
    factor = tl.load(scale) if FIXED else 1.0
    nothing = (x * 0).to(x.dtype)
    for i in tl.static_range(3 - NDIM, 3):
        scatter(
            d_up + b * NDIM * size, size, nothing + (i - (3 - NDIM)), g[i][:, None], factor, cells, keep, NDIM,
            size_z, size_y, size_x, size_y * size_x, size_x, 1, 1, False, 1, NDIM, False, True, FIXED,
        )  # fmt: skip
