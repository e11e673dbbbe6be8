"""Ranges of the random view transforms. Loads no torch, so that the command line can show them at once."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, pi

from coverfast.checks import require


@dataclass(frozen=True)
class ViewSettings:
    """Ranges of the random transforms (COVER Sec. B.1 and B.2); the defaults are the paper's.

    Attributes:
        strength: factor on every range of the spatial map about its neutral value; in [0, 2).
        rotation: largest angle about each axis, radians.
        shear: largest shear angle for each ordered pair of axes, radians.
        scale: largest deviation of the scale of each axis from 1.
        translation: largest shift along each axis, as a fraction of the image's size.
        elastic: standard deviation of the control-point displacements of a smooth elastic part, pixels; 0 is off.
        elastic_spacing: distance of these control points, pixels.
        probability: of each appearance transform.
        noise: largest standard deviation of the Gaussian noise, intensity in [0, 1].
        blur: largest standard deviation of the Gaussian blur, pixels.
        contrast: largest deviation from 1 of the factor on the contrast about the mean.
        brightness: largest standard deviation of the brightness shift.
        boxes: most boxes to in-paint; after the first, each further one has probability 0.95.
    """

    strength: float = 1.0
    rotation: float = pi / 9
    shear: float = pi / 32
    scale: float = 0.5
    translation: float = 0.2
    elastic: float = 0.0
    elastic_spacing: float = 32.0
    probability: float = 0.9
    noise: float = 0.02
    blur: float = 0.05
    contrast: float = 0.5
    brightness: float = 0.1
    boxes: int = 10

    def __post_init__(self) -> None:
        """Refuse ranges that make no map."""
        for name, value in vars(self).items():
            require(isfinite(value), f"{name} must be finite, got {value}")
        require(0 <= self.strength < 2, f"strength must be in [0, 2), got {self.strength}")
        require(
            self.strength * self.scale < 1,
            f"strength * scale must be below 1, where a scale would reach 0, got {self.strength} * {self.scale}",
        )
        require(
            self.strength * self.shear < pi / 2,
            f"strength * shear must be below pi/2, where the tangent turns, got {self.strength} * {self.shear}",
        )
        require(0 <= self.probability <= 1, f"probability must be in [0, 1], got {self.probability}")
        for name in ("rotation", "shear", "scale", "translation", "elastic", "noise", "blur", "contrast", "brightness"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must not be negative, got {value}")
        require(self.elastic_spacing >= 1, f"elastic_spacing must be at least 1 px, got {self.elastic_spacing}")
        require(self.boxes >= 0, f"boxes must not be negative, got {self.boxes}")
