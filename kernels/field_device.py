"""Where pixels look: device code that warp, composition, losses and views share.

A program serves a tile of pixels of one plane of one sample; a lane is one pixel and one block of channels. Fields come
in three forms (`FIELD`): "dense", one vector a pixel; "coarse", the field of a grid of half the size, up-sampled and
doubled on the way; "affine", the numbers `A | t | centre | origin` of each sample. 2D maps are 3D maps with one plane.

Names: b sample, z y x pixel; psi the displacement, one tensor an axis; a cell is `(index of its lower corner, position
in it, whether the slope counts)` along one axis. Lanes whose pixel is out of the grid read nothing (`keep`).
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl


@triton.jit
def place(size_z, size_y, size_x, LANES: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, WIDE: tl.constexpr):
    """Sample and plane of this program; y, x, block of channels of its lanes; which lanes have a pixel of the grid."""
    tiles_x, tiles_y = tl.cdiv(size_x, TILE_X), tl.cdiv(size_y, TILE_Y)
    program = tl.program_id(0)
    first_x = (program % tiles_x) * TILE_X
    program = program // tiles_x
    first_y = (program % tiles_y) * TILE_Y
    program = program // tiles_y
    z, b = program % size_z, (program // size_z).to(tl.int64)
    lane = tl.arange(0, TILE_Y * TILE_X * LANES)
    y = first_y + lane // (TILE_X * LANES)
    x = first_x + (lane // LANES) % TILE_X
    keep = (y < size_y) & (x < size_x)
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    return b, z, y, x, lane % LANES, keep


@triton.jit
def line_of(base, b, z, stride_b, stride_z, UNIT: tl.constexpr):
    """Where a plane of a sample begins, strides in units; 64 bits in any case."""
    return base + (b * stride_b + stride_z.to(tl.int64) * z) * UNIT


@triton.jit
def _halved(i, size):
    """The coarse pixel that fine pixel `i` lies in, and the one beside it that it is nearer to (clamped)."""
    near = i // 2
    return near, tl.minimum(tl.maximum(near + (i % 2) * 2 - 1, 0), size // 2 - 1)


@triton.jit
def displacement(
    field, f_b, f_c, f_z, f_y, f_x, b, z, y, x, keep, size_z, size_y, size_x,
    NDIM: tl.constexpr, FIELD: tl.constexpr,
):  # fmt: skip
    """Psi along (z, y, x) at pixels (z, y, x) of a grid of this size, as a tuple; 0 along z in 2D."""
    psi = ()
    if FIELD == "affine":
        numbers = field + b * (NDIM * (NDIM + 3))
        shape: tl.constexpr = NDIM + 3
        pixel = (z, y, x)
        arms = ()
        for j in tl.static_range(NDIM):
            start, centre = tl.load(numbers + j * shape + NDIM + 2), tl.load(numbers + j * shape + NDIM + 1)
            arms += (pixel[3 - NDIM + j].to(numbers.dtype.element_ty) + (start - centre),)
        if NDIM == 2:
            psi += (tl.zeros_like(arms[1]),)
        for i in tl.static_range(NDIM):
            # A - 1 on the diagonal: the identity leaves exactly nothing.
            total = (tl.load(numbers + i * shape) - (1.0 if i == 0 else 0.0)) * arms[0]
            for j in tl.static_range(1, NDIM):
                total += (tl.load(numbers + i * shape + j) - (1.0 if i == j else 0.0)) * arms[j]
            psi += (total + tl.load(numbers + i * shape + NDIM),)
    elif FIELD == "coarse":
        base = field + b * f_b
        z_0, z_1 = _halved(z, size_z)
        y_0, y_1 = _halved(y, size_y)
        x_0, x_1 = _halved(x, size_x)
        if NDIM == 2:
            psi += (tl.zeros(y.shape, base.dtype.element_ty),)
        for c in tl.static_range(NDIM):
            total = tl.zeros(y.shape, base.dtype.element_ty)
            for far_z in tl.static_range(NDIM - 1):
                for far_y in tl.static_range(2):
                    for far_x in tl.static_range(2):
                        line = base + tl.cast(f_c, tl.int64) * c
                        if NDIM == 3:
                            line += f_z.to(tl.int64) * (z_1 if far_z else z_0)
                        at = (y_1 if far_y else y_0) * f_y + (x_1 if far_x else x_0) * f_x
                        value = tl.load(line + at, mask=keep, other=0)
                        # Three quarters of the pixel it lies in, one of the other, doubled.
                        total += (2 * 0.75**NDIM / 3 ** (far_z + far_y + far_x)) * value
            psi += (total,)
    else:
        line = line_of(field, b, z, f_b, f_z, 1) + (y * f_y + x * f_x)
        if NDIM == 2:
            psi += (tl.zeros(y.shape, field.dtype.element_ty),)
        for c in tl.static_range(NDIM):
            psi += (tl.load(line + tl.cast(f_c, tl.int64) * c, mask=keep, other=0),)
    return psi


@triton.jit
def start_of(field, b, AXIS: tl.constexpr, NDIM: tl.constexpr):
    """First pixel of an affine field's grid in the whole image, along axis 0 .. n - 1."""
    return tl.load(field + b * (NDIM * (NDIM + 3)) + AXIS * (NDIM + 3) + NDIM + 2)


@triton.jit
def points_inside(psi, z, y, x, size_z, size_y, size_x, NDIM: tl.constexpr):
    """Where pixels plus their displacement lie in the grid (COVER Eq. 27); not where they are NaN."""
    at_y, at_x = y.to(psi[1].dtype) + psi[1], x.to(psi[2].dtype) + psi[2]
    inside = (at_y >= 0) & (at_y <= size_y - 1) & (at_x >= 0) & (at_x <= size_x - 1)
    if NDIM == 3:
        at_z = z.to(psi[0].dtype) + psi[0]
        inside = inside & (at_z >= 0) & (at_z <= size_z - 1)
    return inside


@triton.jit
def cell(c, size, WIDE: tl.constexpr, BORDER: tl.constexpr):
    """The cell of coordinate `c`; out of reach, infinite or NaN, it is one beyond the grid (`BORDER`: at its edge)."""
    if BORDER:
        sloped = (c >= 0) & (c < size - 1)
        c = tl.minimum(tl.maximum(tl.where(c == c, c, 0.0), 0.0), (size - 1).to(c.dtype))
    else:
        sloped = (c >= -1) & (c < size)
        c = tl.where(sloped, c, -2.0)
    low = tl.floor(c)
    return low.to(tl.int64 if WIDE else tl.int32), c - low, sloped


@triton.jit
def nearest(of, size):
    """The cell's corner nearest to the coordinate, half to even, and whether it is in the grid."""
    low, part, _ = of
    index = low + ((part > 0.5) | ((part == 0.5) & (low % 2 != 0))).to(low.dtype)
    return index, (index >= 0) & (index < size)


@triton.jit
def corner(of, size, BIT: tl.constexpr, BORDER: tl.constexpr):
    """Index, weight and presence of the lower (0) or upper (1) corner of a cell along an axis."""
    low, part, _ = of
    if BIT == 0:
        return low, 1 - part, low >= 0
    if BORDER:
        return tl.minimum(low + 1, size - 1), part, low >= 0
    return low + 1, part, (low + 1 >= 0) & (low + 1 < size)


@triton.jit
def corner_of(
    cells, size_z, size_y, size_x, s_z, s_y, S_X: tl.constexpr, UNIT: tl.constexpr,
    BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, NDIM: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Offset, weight and presence of one corner of a cell; strides of z and y in units."""
    i_y, w_y, in_y = corner(cells[1], size_y, BY, BORDER)
    i_x, w_x, in_x = corner(cells[2], size_x, BX, BORDER)
    at, weight, inside = i_y * s_y, w_y, in_y & in_x
    if NDIM == 3:
        i_z, w_z, in_z = corner(cells[0], size_z, BZ, BORDER)
        at, weight, inside = at + i_z * s_z, w_z * weight, inside & in_z
    return at * UNIT + i_x * S_X, weight * w_x, inside


@triton.jit
def slope_signs(
    cells, size_z, size_y, size_x, BZ: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, NDIM: tl.constexpr
):
    """D weight / d coordinate along (z, y, x) of one corner of a cell, 0 where the slope does not count."""
    w_z, w_y, w_x = cells[0][1], cells[1][1], cells[2][1]
    w_z, w_y, w_x = w_z if BZ else 1 - w_z, w_y if BY else 1 - w_y, w_x if BX else 1 - w_x
    if NDIM == 2:
        d_z, d_y, d_x = tl.zeros_like(w_y), w_x, w_y
    else:
        d_z, d_y, d_x = w_y * w_x, w_z * w_x, w_z * w_y
    d_z = tl.where(cells[0][2], d_z if BZ else -d_z, 0.0)
    d_y = tl.where(cells[1][2], d_y if BY else -d_y, 0.0)
    d_x = tl.where(cells[2][2], d_x if BX else -d_x, 0.0)
    return d_z, d_y, d_x
