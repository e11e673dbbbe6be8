"""Labelled synthetic anatomy from a seed: a chest slice in 2D, a head in 3D.

Every structure is an implicit surface, negative inside. Structures are painted from the outside in, each over what
lies beneath it and clipped by the surface of its container, so that nesting holds by construction. Subjects differ
in pose, in a smooth deformation of the coordinates, in the size of organs and in intensity; what lies in what, and
what a label means, never changes. Dense arithmetic is limited to sums, products, quotients, square roots and
comparisons, which round the same way on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coverfast.checks import per_axis, require

F32 = NDArray[np.float32]
Rng = np.random.Generator
Point = tuple[float, ...]

CLASSES_2D = ("background", "fat", "soft tissue", "lung", "heart", "vessel", "spine", "rib", "lesion")
CLASSES_3D = ("background", "scalp", "skull", "csf", "cortex", "white matter", "ventricle", "nuclei", "cerebellum")


@dataclass(frozen=True)
class Phantom:
    """One subject: `image (*S)`, float32 in [0, 1], and `labels (*S)`, uint8 indices into `CLASSES_2D` or `_3D`."""

    image: F32
    labels: NDArray[np.uint8]


def phantom(ndim: int, size: int | Sequence[int], *, seed: int, index: int = 0) -> Phantom:
    """Draw subject `index` of the population `seed`: an axial chest slice (2D) or a head (3D) with its labels.

    `size` is the number of pixels, one int or one an axis, at least 16. The anatomy keeps its proportions on any
    grid; one subject at two sizes is the same anatomy with another texture. Axis order is (anterior to posterior,
    right to left), preceded in 3D by superior to inferior. Every class is present from 64 pixels an axis (2D) and
    48 (3D) on. The same arguments give the same arrays.

    Raises `InputError` if `ndim` is not 2 or 3, `size` is too small, or `seed` or `index` is not in [0, 2^64).
    """
    require(ndim in (2, 3), f"ndim must be 2 or 3, got {ndim!r}")
    for name, value in (("seed", seed), ("index", index)):
        ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
        require(ok, f"{name} must be an int in [0, 2^64), got {value!r}")
    shape = per_axis("size", size, ndim, least=16)
    # (seed, index) is the key and ndim the highest word of the counter, so no two subjects share a stream.
    key = np.array([seed, index], dtype=np.uint64)
    # Texture has a stream of its own, for it draws as much as the size asks for and must not shift the anatomy.
    rng, grain = (Rng(np.random.Philox(key=key, counter=[0, 0, use, ndim])) for use in (0, 1))
    canvas = (_chest if ndim == 2 else _head)(shape, rng, grain)
    return Phantom(canvas.finish(), canvas.labels)


def _sum(terms: Iterable[F32]) -> F32:
    return functools.reduce(np.add, terms)


def _spline(lattice: F32, where: Sequence[F32]) -> F32:
    """Cubic B-spline of `lattice` at the outer product of `where` (lattice units, 0 at its second knot)."""
    out = lattice
    for axis, at in enumerate(where):
        cell = np.clip(np.floor(at).astype(np.int64), 0, lattice.shape[axis] - 4)
        t = (at - cell).astype(np.float32)
        u, shape = 1 - t, [-1 if i == axis else 1 for i in range(lattice.ndim)]
        taps = (u * u * u, 3 * t * t * (t - 2) + 4, 3 * t * (1 + t * u) + 1, t * t * t)
        weights = [(w / np.float32(6)).astype(np.float32).reshape(shape) for w in taps]
        out = _sum(np.take(out, cell + i, axis=axis) * w for i, w in enumerate(weights))
    return out


def _noise(rng: Rng, where: Sequence[F32], spacing: float | Sequence[float]) -> F32:
    """Band-limited Gaussian noise of deviation 1 at the outer product of `where`, correlated over `spacing`."""
    steps = [float(spacing)] * len(where) if isinstance(spacing, (int, float)) else [float(s) for s in spacing]
    units = [((w - w[0]) / np.float32(s)).astype(np.float32) for w, s in zip(where, steps, strict=True)]
    lattice = rng.standard_normal([int(u[-1]) + 5 for u in units], dtype=np.float32)
    # The deviation of a cubic spline of unit white noise is between 0.68 and 0.71 an axis.
    return np.asarray(_spline(lattice, [u + rng.random(dtype=np.float32) for u in units]) / 0.69 ** len(units))


def _ellipsoid(p: Sequence[F32], centre: Point, radii: Point) -> F32:
    """First-order signed distance to an axis-aligned ellipse or ellipsoid."""
    squares = [((x - c) * (1 / r)) ** 2 for x, c, r in zip(p, centre, radii, strict=True)]
    k0, k1 = np.sqrt(_sum(squares)), np.sqrt(_sum(q * (1 / r**2) for q, r in zip(squares, radii, strict=True)))
    # k1 is 0 at the centre only, where the quotient's limit is minus the smallest radius.
    return np.asarray(np.maximum(k0 * (k0 - 1) / np.maximum(k1, 1e-6), -min(radii)), dtype=np.float32)


def _capsule(p: Sequence[F32], start: Point, end: Point, r0: float, r1: float) -> F32:
    """Signed distance to a straight tube whose radius goes from `r0` at `start` to `r1` at `end`."""
    along = [float(e - s) for s, e in zip(start, end, strict=True)]
    rel = [x - float(s) for x, s in zip(p, start, strict=True)]
    square = sum(a * a for a in along)
    h = np.clip(_sum(x * (a / square) for a, x in zip(along, rel, strict=True)), 0, 1)
    gap = np.sqrt(_sum((x - h * a) ** 2 for a, x in zip(along, rel, strict=True)))
    return np.asarray(gap - (r0 + (r1 - r0) * h), dtype=np.float32)


def _union(*parts: F32) -> F32:
    return functools.reduce(np.minimum, parts)


def _both(*parts: F32) -> F32:
    return functools.reduce(np.maximum, parts)


def _turn(p: Sequence[F32], first: int, second: int, angle: float) -> list[F32]:
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    out = list(p)
    out[first], out[second] = c * p[first] - s * p[second], s * p[first] + c * p[second]
    return out


def _step(start: Point, angle: float, side: float, length: float) -> Point:
    """The point `length` from `start` at `angle` from the outward direction of that side, in 2D."""
    return (start[0] + length * float(np.sin(angle)), start[1] + side * length * float(np.cos(angle)))


class _Canvas:
    """The grid in the anatomy's own coordinates, and the image and labels painted so far."""

    def __init__(self, shape: tuple[int, ...], extent: Point, rng: Rng, grain: Rng, tilt: float) -> None:
        n = len(shape)
        self.rng, self.grain, self.shape = rng, grain, shape
        self.unit = float(min(s / (2 * e) for s, e in zip(shape, extent, strict=True)))  # pixels a unit length
        self.axes = [(np.arange(s, dtype=np.float32) - (s - 1) / 2) / np.float32(self.unit) for s in shape]
        grown, moved = rng.uniform(0.94, 1.04, n), rng.uniform(-0.04, 0.04, n)
        grid = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        p = [g * np.float32(1 / s) - np.float32(m) for g, s, m in zip(grid, grown, moved, strict=True)]
        # Modes no shorter than 0.9 with these amplitudes change a length by less than a third: no folds.
        # The lattice spans the anatomy, not the canvas, so that a subject is the same on any grid.
        frame = [np.clip((a + np.float32(1.6)) / np.float32(0.9), 0, 3.5) for a in self.axes]
        bend = [np.clip(_spline(rng.standard_normal([7] * n, dtype=np.float32), frame), -1, 1) for _ in shape]
        p = [x + np.float32(0.085) * b for x, b in zip(p, bend, strict=True)]
        for i in range(n):
            for j in range(i + 1, n):
                p = _turn(p, i, j, rng.uniform(-tilt, tilt))
        self.p, self.image, self.labels = p, np.zeros(shape, np.float32), np.zeros(shape, np.uint8)

    def thick(self, length: float, least: float = 1.0) -> float:
        """A thickness in anatomy units that is never less than `least` pixels."""
        return max(length, least / self.unit)

    def wobble(self, spacing: float) -> F32:
        """Smooth noise of deviation 1 in anatomy units, the same at every size."""
        frame = [np.clip((a + np.float32(1.6)) / np.float32(spacing), 0, 3.2 / spacing) for a in self.axes]
        lattice = self.rng.standard_normal([int(3.2 / spacing) + 5] * len(self.shape), dtype=np.float32)
        return np.asarray(_spline(lattice, frame) / 0.69 ** len(self.shape))

    def paint(self, label: int, surface: F32, level: float | F32, grain: float, spacing: float | Point) -> None:
        """Paint one class where `surface` (anatomy units) is negative, with an edge one and a half pixels wide.

        `grain` is the deviation of its texture and `spacing` its correlation length in pixels.
        """
        texture = _noise(self.grain, [np.arange(s, dtype=np.float32) for s in self.shape], spacing)
        value = level + np.float32(grain) * np.clip(texture, -2.5, 2.5)
        alpha = np.clip(np.float32(0.5) - surface * np.float32(self.unit / 1.5), 0, 1)
        self.image = self.image + alpha * (value - self.image)
        self.labels[surface < 0] = label

    def finish(self) -> F32:
        """Bias field, noise, and the range [0, 1]."""
        bias = 1 + np.float32(0.07) * np.clip(_noise(self.rng, self.axes, 1.1), -2, 2)
        noise = self.grain.standard_normal(self.shape, dtype=np.float32) * np.float32(0.012)
        return np.clip(np.abs(self.image * bias + np.float32(0.01) + noise), 0, 1).astype(np.float32)


def _chest(shape: tuple[int, ...], rng: Rng, grain: Rng) -> _Canvas:
    """An axial chest slice: fat, muscle, ribs, spine, two lungs with vessels and a lesion, heart, aorta."""
    c = _Canvas(shape, (0.86, 1.04), rng, grain, tilt=0.14)
    p = [c.p[0] * np.float32(0.93), c.p[1]]
    grow = [float(g) for g in rng.uniform(0.88, 1.12, 8)]
    tone = [float(t) for t in rng.uniform(-0.035, 0.035, 9)]
    rough = [c.wobble(s) for s in (0.5, 0.3, 0.3, 0.18)]

    body = _ellipsoid(p, (0, 0), (0.70, 0.96))
    fat = c.thick(0.06 * grow[0], 2.6) * np.clip(1 + np.float32(0.4) * rough[0], 0.8, 2)
    muscle = body + fat
    cage = _both(_ellipsoid(p, (-0.01, 0), (0.53, 0.76)), muscle + c.thick(0.05, 2.0))  # the middle of the ribs
    cavity = cage + c.thick(0.055, 1.6)

    heart = _turn([p[0] + np.float32(0.11), p[1] - np.float32(0.12)], 0, 1, 0.55)
    d_heart = _ellipsoid(heart, (0, 0), (0.25 * grow[1], 0.32 * grow[2])) + np.float32(0.012) * rough[1]
    d_heart = _both(d_heart, cavity + c.thick(0.02))
    aorta = _ellipsoid(p, (0.21, 0.15), (c.thick(0.072 * grow[3], 2.0),) * 2)
    disc = _ellipsoid(p, (0.36, 0), (0.115 * grow[4], 0.15 * grow[4]))
    canal = _ellipsoid(p, (0.50, 0), (0.042, 0.055))
    arch = _capsule(p, (0.44, 0), (0.66, 0), c.thick(0.05), c.thick(0.022))
    wings = [_capsule(p, (0.46, 0), (0.50, s * 0.19), c.thick(0.045), c.thick(0.028)) for s in (-1, 1)]
    spine = _both(_union(disc, arch, _ellipsoid(p, (0.50, 0), (0.085, 0.10)), *wings), muscle + c.thick(0.02, 1.8))

    # The lungs are what the mediastinum leaves of the chest cavity.
    waist = abs(p[1]) - c.thick(0.06) - np.float32(0.10) * p[0] ** 2
    filled = _union(d_heart - c.thick(0.03), aorta - c.thick(0.025), disc - c.thick(0.03), waist)
    lung = _both(cavity, -filled)

    c.paint(1, body, 0.30 + tone[1], 0.035, 6.0)
    c.paint(2, muscle, 0.50 + tone[2], 0.045, (2.5, 6.0))
    fibres = 0.5 + tone[2] + np.float32(0.09) * np.clip(rough[2], -1.5, 1.5)
    c.paint(2, _both(muscle + c.thick(0.02), -(cage - c.thick(0.03))), fibres, 0.04, (2.5, 7.0))
    c.paint(3, lung, 0.13 + tone[3] / 2 + np.float32(0.03) * np.clip(rough[3], -2, 2), 0.03, 2.6)

    tree: list[F32] = []
    for side in (-1.0, 1.0):
        hilum = (float(rng.uniform(-0.02, 0.06)), side * float(rng.uniform(0.2, 0.26)))
        for angle in np.linspace(-1.25, 1.25, 6) + rng.uniform(-0.3, 0.3, 6):
            width = rng.uniform(0.014, 0.022)
            fork = _step(hilum, angle, side, rng.uniform(0.17, 0.26))
            tree.append(_capsule(p, hilum, fork, width, 0.7 * width))
            for bend in rng.uniform(0.2, 0.65, 2) * (-1, 1):
                tip = _step(fork, angle + bend, side, rng.uniform(0.14, 0.24))
                tree.append(_capsule(p, fork, tip, 0.65 * width, 0.3 * width))
    c.paint(5, _both(_union(*tree), lung + c.thick(0.01, 0.5)), 0.60 + tone[5], 0.02, 3.0)

    side = float(rng.choice([-1.0, 1.0]))
    at = (float(rng.uniform(0.0, 0.16)), side * float(rng.uniform(0.53, 0.58)))
    size = c.thick(float(rng.uniform(0.055, 0.09)), 2.6)
    lesion = _ellipsoid(p, at, (size, size * float(rng.uniform(0.8, 1.25)))) + np.float32(0.012) * rough[3]
    c.paint(8, _both(lesion, lung + c.thick(0.015, 1.6)), 0.42 + tone[8], 0.05, 2.2)

    c.paint(4, d_heart, 0.57 + tone[4], 0.025, 5.0)
    left = _ellipsoid(heart, (0.02, 0.07), (0.135 * grow[1], 0.17 * grow[2]))
    right = _ellipsoid(heart, (-0.04, -0.17), (0.12 * grow[1], 0.085 * grow[2]))
    chambers = _both(_union(left, right), d_heart + c.thick(0.035))
    c.paint(4, chambers, 0.70 + tone[4], 0.02, 4.0)
    c.paint(5, aorta, 0.76 + tone[5], 0.02, 4.0)

    c.paint(6, spine, 0.90 + tone[6], 0.03, 2.5)
    c.paint(6, spine + c.thick(0.03), 0.74 + tone[6], 0.06, 2.2)
    c.paint(2, canal, 0.46 + tone[2], 0.02, 3.0)

    ribs = []
    for side in (-1.0, 1.0):
        for a in np.array([0.42, 1.02, 1.55, 2.1, 2.62]) + rng.uniform(-0.1, 0.1, 5):
            middle = (-0.01 + 0.53 * np.cos(a), side * 0.76 * np.sin(a))
            tangent, half = np.arctan2(-0.53 * np.sin(a), 0.76 * np.cos(a)), rng.uniform(0.07, 0.12)
            ends = (_step(middle, tangent, side, -half), _step(middle, tangent, side, half))
            thick = c.thick(0.028, 1.1)
            ribs.append(_capsule(p, *ends, thick, thick * rng.uniform(0.7, 1)))
    ribs.append(_capsule(p, (-0.55, -0.09), (-0.55, 0.09), c.thick(0.032), c.thick(0.032)))  # the sternum
    wall = _both(muscle + c.thick(0.01), -(cavity - c.thick(0.008)), -(spine - c.thick(0.02)))
    rib = _both(_union(*ribs), wall)
    c.paint(7, rib, 0.95 + tone[7], 0.02, 3.0)
    c.paint(7, rib + c.thick(0.02), 0.82 + tone[7], 0.05, 2.2)
    return c


def _head(shape: tuple[int, ...], rng: Rng, grain: Rng) -> _Canvas:
    """A head, T1-weighted in look: scalp, skull, fluid, folded cortex, white matter, ventricles, nuclei."""
    c = _Canvas(shape, (1.0, 1.0, 0.86), rng, grain, tilt=0.09)
    z, y, x = c.p
    mirror = [z, y, abs(x)]
    grow = [float(g) for g in rng.uniform(0.88, 1.12, 8)]
    tone = [float(t) for t in rng.uniform(-0.03, 0.03, 9)]
    folds, gyri, folia = c.wobble(0.115), c.wobble(0.4), c.wobble(0.06)

    head = _ellipsoid(c.p, (0.02, 0, 0), (0.94, 0.92, 0.76))
    cavity = _both(_ellipsoid(c.p, (-0.10, 0.02, 0), (0.72, 0.78, 0.62)), head + c.thick(0.10, 4.2))
    skull = _both(cavity - c.thick(0.055 * grow[0], 1.6), head + c.thick(0.04, 2.3))
    small = _ellipsoid(mirror, (0.42, 0.40, 0.16), (0.19 * grow[1], 0.27 * grow[1], 0.30))
    small = _both(small, cavity + c.thick(0.03, 1.5))
    stem = _both(_capsule(c.p, (0.10, 0.05, 0), (0.60, 0.22, 0), 0.12, 0.085), cavity + c.thick(0.03, 1.5))

    # Sulci are sheets: the zero set of a band-limited field, reaching `depth` below the hull but never the core.
    # Grey matter is what lies within the cortical thickness of the hull or of a sheet.
    hull = _both(cavity + c.thick(0.025, 1.4), -(small - c.thick(0.03)))
    core = _ellipsoid(c.p, (0.0, 0, 0), (0.28, 0.46, 0.37))
    depth = np.float32(0.22 * grow[2]) + np.float32(0.03) * np.clip(gyri, -1.5, 1.5)
    slope = np.sqrt(_sum(np.gradient(folds, axis=i) ** 2 for i in range(3))) * np.float32(c.unit)
    below = np.maximum(_both(-hull - depth, -core), 0)
    sheet = np.sqrt((folds / np.maximum(slope, 2)) ** 2 + below**2)
    cleft = np.sqrt(x**2 + np.maximum(z + np.float32(0.24) - np.float32(0.9) * y**2, 0) ** 2)
    groove = np.float32(c.thick(0.010, 0.4))
    cortex = _both(hull, groove - sheet, groove - cleft)
    ribbon = np.float32(c.thick(0.055 * grow[3], 1.4))
    white = _union(_both(hull + ribbon, ribbon + groove - sheet, ribbon + groove - cleft), stem)

    c.paint(1, head, 0.80 + tone[1] + np.float32(0.05) * np.clip(gyri, -2, 2), 0.06, 3.5)
    c.paint(2, skull, 0.10 + tone[2] / 2, 0.02, 3.0)
    c.paint(3, cavity, 0.27 + tone[3], 0.02, 4.0)
    c.paint(4, cortex, 0.44 + tone[4], 0.03, 2.5)
    c.paint(5, white, 0.65 + tone[5], 0.03, 4.0)
    c.paint(8, small, 0.40 + tone[8] + np.float32(0.16) * np.minimum(abs(folia), 1), 0.02, 3.0)

    inner = white + c.thick(0.01, 0.4)
    thalamus = _ellipsoid(mirror, (0.06, 0.06, 0.12), (0.10 * grow[4], 0.15 * grow[4], 0.085 * grow[4]))
    putamen = _ellipsoid(mirror, (0.05, -0.10, 0.27), (0.11 * grow[5], 0.18 * grow[5], 0.065 * grow[5]))
    c.paint(7, _both(_union(thalamus, putamen), inner), 0.51 + tone[7], 0.03, 2.5)
    r = 0.075 * grow[6]
    front = _capsule(mirror, (-0.10, -0.30, 0.09), (-0.12, 0.18, 0.13), c.thick(r, 1.2), c.thick(r, 1.2))
    horn = _capsule(mirror, (-0.12, 0.18, 0.13), (-0.04, 0.34, 0.19), c.thick(r, 1.2), c.thick(0.6 * r))
    third = _ellipsoid(mirror, (0.08, 0.0, 0.0), (0.11, 0.15, c.thick(0.022)))
    c.paint(6, _both(_union(front, horn, third), inner), 0.15 + tone[6] / 2, 0.01, 4.0)
    return c
