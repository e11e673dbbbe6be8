"""What was done to the images of a run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EIGHT_BIT = "Values from lo to hi become 0 to 1: 0 and 255 of 8-bit images, otherwise each image's own extremes."
_OWN = "Values from each volume's own minimum to its maximum become 0 to 1."
_FITS = {"squash": "squashed to", "crop": "cut to the middle square, of", "pad": "padded to a square, of"}


def in_words(settings: Mapping[str, Any]) -> str:
    """Sentences on the preprocessing of a shard, whose settings are whole."""
    s = settings
    match s.get("preset"):
        case "raw" if s.get("size") is None:
            return f"Images as their files hold them. {_EIGHT_BIT}"
        case "raw":
            side = s["size"]
            return f"Images scaled to a short side of {side} pixels, of which the middle {side} x {side}. {_EIGHT_BIT}"
        case "chest-xray":
            return f"Radiographs {_FITS[s['fit']]} {s['size']} x {s['size']} pixels. {_EIGHT_BIT}"
        case "brain-mr":
            voxels = " x ".join(map(str, s["shape"]))
            return (
                f"MR volumes of {voxels} voxels (z, y, x), all sides of a voxel equal, cut and scaled to fit the "
                f"foreground, which is brighter than {100 * s['threshold']:g} % of the way from percentile 1 to 99. "
                f"Voxels are no smaller than the finest spacing of the file over {s['enlarge']:g}. {_OWN}"
            )
        case "ct":
            low, high = s["clip"]
            return (
                f"CT volumes with voxels of {s['spacing']:g} mm. Values, clipped to {low:g} to {high:g}, become 0 to 1."
            )
        case "phantom" | "atlas" as made:
            return f"Synthetic images ({made}), with values from 0 to 1."
        case made:
            return f"By no preset of coverfast{f' ({made})' if made else ''}; values from 0 to 1 enter the network."
