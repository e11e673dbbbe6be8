"""Both views, registered with torch: Triton alone. In torch they are the composition in `coverfast.views`."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_pair(
    pair: Tensor,
    images: Tensor,
    numbers: Tensor,
    params: Tensor,
    field: Tensor,
    form: str,
    seed: int,
    iteration: int,
    *,
    boxes: int,
    taps: int,
) -> None:
    """Fill pair `(2 B, C, *S)`, contiguous float32: crops of the images in a new appearance, then warped ones.

    Args:
        pair: written.
        images: `(B, C, *S')` float32, any strides.
        numbers: `AffineDVF.numbers`, whose origins say where the crops begin.
        params: what is drawn for each sample, see `kernels.views_device`.
        field: where view b looks in the images: `numbers` with form "crop", or a field `(B, n, *S)` with form "dense".
        form: see `ops.warp`.
        seed: 64-bit key of the noise.
        iteration: of the training.
        boxes: number of boxes in `params`.
        taps: number of weights of the blur in `params`, 0 for none.
    """
    key, counter = _signed(seed, iteration)
    torch.ops.coverfast.view_pair(pair, images, numbers, params, field, form, key, counter, boxes, taps)


def fill_augmented(
    out: Tensor,
    images: Tensor,
    numbers: Tensor,
    params: Tensor,
    field: Tensor,
    form: str,
    seed: int,
    iteration: int,
    *,
    boxes: int,
    taps: int,
) -> None:
    """Fill out `(B, C, *S)`, contiguous float32, with warped images in a new appearance; see `fill_pair`."""
    key, counter = _signed(seed, iteration)
    torch.ops.coverfast.view_augmented(out, images, numbers, params, field, form, key, counter, boxes, taps)


def _signed(seed: int, iteration: int) -> tuple[int, int]:
    """The same bits as signed numbers."""
    pairs = ((seed, 64), (iteration, 32))
    key, counter = (value - 2**bits if value >> (bits - 1) else value for value, bits in pairs)
    return key, counter


_ARGUMENTS = (
    "Tensor images, Tensor numbers, Tensor params, Tensor field, str form, int seed, int iteration, int boxes, int taps"
)


def _fills(*_: object) -> None:
    """Of fake tensors: what is written is there already."""


@torch.library.custom_op(
    "coverfast::view_pair",
    mutates_args=("pair",),
    schema=f"(Tensor(a!) pair, {_ARGUMENTS}) -> ()",
)
def _view_pair(
    pair: Tensor,
    images: Tensor,
    numbers: Tensor,
    params: Tensor,
    field: Tensor,
    form: str,
    seed: int,
    iteration: int,
    boxes: int,
    taps: int,
) -> None:
    from coverfast.kernels import views as kernels
    from coverfast.kernels.warp import forward_launch

    x_a, x_b = pair.chunk(2) if len(pair) else (pair, pair)
    for launch in kernels.appearance_launches(
        images, numbers, params, x_a, boxes=boxes, taps=taps, seed=seed, iteration=iteration
    ):
        launch.run()
    forward_launch(images, field, form, x_b, "linear", "zeros").run()


_view_pair.register_fake(_fills)


@torch.library.custom_op(
    "coverfast::view_augmented",
    mutates_args=("out",),
    schema=f"(Tensor(a!) out, {_ARGUMENTS}) -> ()",
)
def _view_augmented(
    out: Tensor,
    images: Tensor,
    numbers: Tensor,
    params: Tensor,
    field: Tensor,
    form: str,
    seed: int,
    iteration: int,
    boxes: int,
    taps: int,
) -> None:
    from coverfast.kernels import views as kernels
    from coverfast.kernels.warp import forward_launch

    warped = torch.empty_like(out)
    forward_launch(images, field, form, warped, "linear", "zeros").run()
    here = numbers.clone()
    here[..., -1] = 0  # what is warped begins where the crop does
    for launch in kernels.appearance_launches(
        warped, here, params, out, boxes=boxes, taps=taps, seed=seed, iteration=iteration
    ):
        launch.run()


_view_augmented.register_fake(_fills)
