"""Whether GVSL finds known deformations: the NCC that it raises, and how far its fields are from the truth.

    python examples/gvsl_recovery.py                        # two phantoms related by a known map
    python examples/gvsl_recovery.py --data mni152          # a brain template against four deformed copies of it
    python examples/gvsl_recovery.py --data mni152 --ndim 3

Image B is a phantom or the MNI152 template (in the package nilearn), image A a copy of it under a known affine map and
a known smooth deformation, `A(p) = B(Affine(p + u(p)))`. GVSL learns from these pairs of images and never sees the
truth. Told are the local NCC, and the mean end-point error over the pixels of the body of the field found and of no
displacement at all; of the template also those of four other copies, which were not learned from. Pictures and numbers
go to a folder.
"""

import argparse
import json
import time
from math import pi
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coverfast import affine_dvf, fuse_affine, ncc_loss, warp
from coverfast.affine import compose_affine, rotations
from coverfast.backbones import UNet
from coverfast.distortions import distort
from coverfast.geometry import inside_mask
from coverfast.methods import Shown
from coverfast.methods.gvsl import GVSL, Pair
from coverfast.phantom import phantom
from coverfast.report import write_report

SIZES = {2: (128, 128), 3: (48, 48, 48)}
COPIES, LOOK_EVERY = {"phantom": 1, "mni152": 4}, 25


def template(data: str, ndim: int) -> Tensor:
    """B, `(1, 1, *S)` in [0, 1]; of the brain in 2D the axial slice through the middle of the ventricles."""
    if data == "phantom":
        return torch.from_numpy(phantom(ndim, SIZES[ndim], seed=0).image)[None, None].float()
    from nilearn.datasets import load_mni152_template

    brain = np.asarray(load_mni152_template(resolution=2 if ndim == 2 else 4).dataobj, np.float32)
    found = torch.from_numpy(brain.transpose(2, 1, 0).copy()).clamp(min=0)
    found = found[found.shape[0] // 2] if ndim == 2 else found
    size = [-(-s // 16) * 16 for s in found.shape]  # what the network can halve four times
    padded = found.new_zeros(size)
    padded[tuple(slice((t - s) // 2, (t - s) // 2 + s) for s, t in zip(found.shape, size, strict=True))] = found
    return (padded / padded.max())[None, None]


def truth(index: int, size: torch.Size) -> Tensor:
    """The field of a known map, `(1, n, *S)` in pixels: affine within a third of GVSL's bounds, and smooth."""
    n, draws = len(size), torch.Generator().manual_seed(1000 + index)

    def uniform(count: int, most: float) -> Tensor:
        return most * (2 * torch.rand(1, count, generator=draws) - 1)

    sides = torch.tensor([float(s) for s in size])
    theta = compose_affine(
        uniform(rotations(n), pi / 27), 1 + uniform(n, 0.08), uniform(n * (n - 1), 0.06), uniform(n, 0.06) * sides
    )
    lattice = torch.randn(1, n, *[4] * n, generator=draws) * 0.015 * max(size)
    mode = "bicubic" if n == 2 else "trilinear"
    smooth = torch.nn.functional.interpolate(lattice, size=tuple(size), mode=mode, align_corners=True)
    return fuse_affine(smooth, theta)


def pairs(moving: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Copies A of an image and the fields that bring it over to them, `(count, 1, *S)` and `(count, n, *S)`."""
    fields = torch.cat([truth(first + i, moving.shape[2:]) for i in range(count)])
    return warp(moving.expand(count, *moving.shape[1:]), fields), fields


def pair_of(fixed: Tensor, moving: Tensor, iteration: int) -> Pair:
    """What GVSL learns from."""
    seen = distort(fixed, seed=0, iteration=iteration)
    return Pair(torch.cat([seen, moving.expand_as(fixed)]), fixed)


@torch.no_grad()
def figures(gvsl: GVSL, fixed: Tensor, moving: Tensor, fields: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """NCC and end-point error before and after, the field found and B brought over."""
    gvsl.eval()
    moving = moving.expand_as(fixed)
    found = gvsl.match(Pair(torch.cat([fixed, moving]), fixed))
    gvsl.train()
    body = (fixed > 0.05) & inside_mask(fields)

    def error(field: Tensor) -> float:
        return float(torch.linalg.vector_norm(field - fields, dim=1, keepdim=True)[body].mean())

    values = {
        "ncc_before": 1 - float(ncc_loss(fixed, moving)),
        "ncc": 1 - float(ncc_loss(fixed, found.moved)),
        "epe_identity": error(torch.zeros_like(fields)),
        "epe": error(found.matched.dvf),
        "epe_affine": error(affine_dvf(found.matched.theta, fields.shape[2:])),
    }
    return values, found.matched.dvf, found.moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("phantom", "mni152"), default="phantom")
    parser.add_argument("--ndim", type=int, choices=(2, 3), default=2)
    parser.add_argument(
        "--iterations", type=int, default=0, help="by default 200 for a phantom, 500 for a template; in 3D 60, 150"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gvsl-recovery"))
    args = parser.parse_args()
    copies = COPIES[args.data]
    iterations = args.iterations or {(1, 2): 200, (4, 2): 500, (1, 3): 60, (4, 3): 150}[copies, args.ndim]

    torch.manual_seed(0)
    moving = template(args.data, args.ndim)
    network = UNet(args.ndim, 1, (8, 16, 32, 64, 64, 64, 32, 16, 8))
    gvsl = GVSL(network, crop=tuple(moving.shape[2:]))
    optimizer = torch.optim.Adam(gvsl.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    learned, held_out = pairs(moving, 0, copies), pairs(moving, copies, copies)

    curve, begun = list[dict[str, float]](), time.monotonic()
    for iteration in range(1, iterations + 1):
        loss = gvsl(pair_of(learned[0], moving, iteration)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gvsl.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if iteration % LOOK_EVERY == 0 or iteration in (1, iterations):
            values, field, moved = figures(gvsl, learned[0], moving, learned[1])
            others = figures(gvsl, held_out[0], moving, held_out[1])[0] if copies > 1 else {}
            values |= {f"val_{name}": value for name, value in others.items()}
            curve.append({"iteration": iteration, "loss": loss.item(), **values})
            told = f"; held out NCC {others['ncc']:.3f}, error {others['epe']:.2f} px" if others else ""
            print(
                f"{iteration:5d}  {time.monotonic() - begun:4.0f} s  loss {loss.item():.3f}  NCC {values['ncc']:.3f} "
                f"(before {values['ncc_before']:.3f})  end-point error {values['epe']:.2f} px (identity "
                f"{values['epe_identity']:.2f}, affine part alone {values['epe_affine']:.2f}){told}",
                flush=True,
            )

    seconds, last, where = time.monotonic() - begun, curve[-1], args.out / f"{args.data}-{args.ndim}d"
    a, b = learned[0][0], moving[0]
    shown = Shown(
        images={"A": a, "B": b, "B brought over to A": moved[0]},
        overlays={"before matching": (a, b), "after matching": (a, moved[0])},
        fields={"true field": learned[1][0], "field found": field[0]},
        text=f"End-point error {last['epe']:.2f} px, of no displacement {last['epe_identity']:.2f} px; local NCC "
        f"{last['ncc']:.3f}, before matching {last['ncc_before']:.3f}.",
        help="A is a copy of B under a known map. In black regions there is nothing to match: the errors are over the "
        "pixels of the body.",
    )
    metrics = {name: np.array([row[name] for row in curve], float) for name in curve[0]}
    about = {"data": args.data, "images": "x".join(map(str, a.shape[1:])), "iterations": iterations}
    page = write_report(where, shown, metrics, title="Known deformations, found by GVSL", about=about)
    facts = {"data": args.data, "ndim": args.ndim, "seconds": round(seconds, 1), "torch": torch.__version__}
    (where / "recovery.json").write_text(json.dumps(facts | {"curve": curve}, indent=1) + "\n")
    print(f"{page}  {where / 'recovery.json'}  {seconds:.0f} s")


if __name__ == "__main__":
    main()
