"""Features of pixels by class: pictures by PCA and t-SNE (COVER Fig. 6), and how far classes lie apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from coverfast.backbones import Backbone, UNet, build, load_backbone
from coverfast.backbones.base import title
from coverfast.checks import InputError, require
from coverfast.disk import explained, write_atomically
from coverfast.dispersion import effective_rank
from coverfast.report.sheet import need_matplotlib
from coverfast.shard_reader import Region
from coverfast.shard_set import ShardSet
from coverfast.study.figures import Cloud, features_picture
from coverfast.study.tables import features_rows, markdown
from coverfast.training.assembly import choose_device

Array = NDArray[Any]

#: Images that are looked at, evenly spread over the split, and the longest side that passes at once.
_IMAGES, _SIDE = 64, {2: 512, 3: 128}


class Pixels(NamedTuple):
    """Sampled pixels: class of each `(N,)`, and by image the region that passes and the pixels' places in it, flat.

    Those of the first image come first.
    """

    classes: NDArray[np.int64]
    places: dict[int, tuple[Region, NDArray[np.int64]]]


def study_features(
    backbones: Sequence[str | Path],
    data: Sequence[str | Path],
    folder: Path,
    *,
    split: str = "test",
    samples: int = 2000,
    level: int = -1,
    seed: int = 0,
    device: str = "auto",
    own: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Features of pixels by class, of networks and of random weights: features.json, features.md and features.png.

    level: 0 is the coarsest, -1 the finest. own: see `coverfast.load_backbone`. samples: pixels, see `sample_pixels`.
    seed: of the pixels, the random weights and t-SNE. tell: is told what is being done. Returns what features.json has.

    Raises:
        InputError: see `load_networks` and `sample_pixels`; for a level that a network lacks, a folder that holds such
            a study, or without scikit-learn or matplotlib.
    """
    _need_sklearn()
    need_matplotlib()
    require(not (folder / "features.json").exists(), f"out must be a new folder, but {folder} holds a features.json")
    shards = ShardSet(list(data), split)
    networks = load_networks(backbones, shards, seed, own)
    for name, network in networks.items():
        fits = -network.levels <= level < network.levels
        require(fits, f"level must be 0 to {network.levels - 1}, or -1 for the finest, for {name}, got {level}")
    pixels = sample_pixels(shards, samples, seed, max(max(network.strides) for network in networks.values()))
    chosen, figures, clouds = choose_device(device), [], []
    for name, network in networks.items():
        tell(name)
        features = pixel_features(network, shards, pixels, level, chosen).astype(np.float64)
        figures.append({"name": name, **separation(features, pixels.classes)})
        points, share = principal(features)
        note = f"silhouette {figures[-1]['silhouette']:.2f}, separation {figures[-1]['separation']:.2f}"
        clouds.append(Cloud(name, points, embedded(features, seed), share, note))
    names = [c.name for c in shards.label_classes]
    for row in figures:
        row["by_class"] = {names[k]: value for k, value in row["by_class"].items()}
    counts = np.bincount(pixels.classes, minlength=len(names)).tolist()
    about = {"split": split, "level": level, "seed": seed, "images": len(pixels.places)}
    result = {**about, "pixels": dict(zip(names, counts, strict=True)), "networks": figures}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shown = "finest level" if level < 0 else f"level {level}"
    title = f"{shown}, {len(pixels.classes)} pixels of {len(pixels.places)} images (split {split})"
    write_atomically(folder / "features.png", features_picture(clouds, pixels.classes, names, title))
    write_atomically(folder / "features.md", markdown(*features_rows(result)))
    write_atomically(folder / "features.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def load_networks(
    paths: Sequence[str | Path], shards: ShardSet, seed: int, own: str | None = None
) -> dict[str, Backbone]:
    """Backbones of files or run folders by name, and with them one of random weights for each architecture.

    own: see `coverfast.load_backbone`.

    Raises:
        InputError: for files that are none, names that are the same, and networks that do not fit the shards.
    """
    found: dict[str, Backbone] = {}
    for path in map(Path, paths):
        name = str(path)
        require(name not in found, f"networks must be different ones, got {name} twice")
        network = load_backbone(path, own=own)
        require(
            (network.ndim, network.in_channels) == (shards.ndim, shards.channels),
            f"{name} must be a network for {shards.ndim}D images of {shards.channels} channel(s) like "
            f"{shards.paths[0]}, but it is one for {network.ndim}D images of {network.in_channels} channel(s)",
        )
        found[name] = network
    shapes = {json.dumps(network.description, sort_keys=True): network for network in found.values()}
    for network in shapes.values():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            channels = "-".join(map(str, network.channels)) if isinstance(network, UNet) else title(network.description)
            more = f", {channels}" if len(shapes) > 1 else ""
            found[f"random weights{more}"] = build(network.description, own=own).eval()
    return found


def sample_pixels(shards: ShardSet, count: int, seed: int, stride: int) -> Pixels:
    """About `count` pixels in all, as many of every class, from the middle of up to 64 images.

    The middle is the largest part of an image whose sides are multiples of `stride`, at most 512 px (2D) or 128 px
    (3D). Within a class every pixel of all images is as likely as any other; a class with fewer gives all it has.

    Raises:
        InputError: for shards without label maps, images smaller than `stride`, or a split with one class alone.
    """
    names = shards.label_classes
    require(len(names) > 0, f"{shards.paths[0]} must have label maps, but it has none")
    images = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _IMAGES)).round().astype(np.int64))
    regions = {int(i): _middle(shards, int(i), stride) for i in images}
    counts = np.stack([np.bincount(_labels(shards, i, r), minlength=len(names)) for i, r in regions.items()])
    there = np.flatnonzero(counts.sum(axis=0) > 1)
    require(
        len(there) > 1,
        f"the split {shards.split} of {shards.paths[0]} must have pixels of 2 classes or more, found "
        f"{', '.join(names[k].name for k in there) or 'none'}",
    )
    rng = np.random.default_rng(seed)
    shares = np.zeros_like(counts)
    for k in there:
        wanted = min(max(2, count // len(there)), int(counts[:, k].sum()))
        shares[:, k] = rng.multivariate_hypergeometric(counts[:, k], wanted, method="marginals")
    places, classes = {}, []
    for (image, region), share in zip(regions.items(), shares, strict=True):
        labels = _labels(shards, image, region)
        own = [rng.choice(np.flatnonzero(labels == k), share[k], replace=False) for k in np.flatnonzero(share)]
        if own:
            places[image] = region, np.concatenate(own)
            classes.append(labels[places[image][1]])
    return Pixels(np.concatenate(classes).astype(np.int64), places)


def _middle(shards: ShardSet, image: int, stride: int) -> Region:
    size = shards.sizes[image]
    side = np.minimum(size, _SIDE[shards.ndim]) // stride * stride
    require(
        bool(side.all()),
        f"{shards.source(image)} must have at least {stride} pixels an axis for this network, got "
        f"{'x'.join(map(str, size.tolist()))}",
    )
    first = (size - side) // 2
    return tuple(slice(int(a), int(a + b)) for a, b in zip(first, side, strict=True))


def _labels(shards: ShardSet, image: int, region: Region) -> NDArray[np.uint8]:
    return shards.labels(image, (region,))[0].reshape(-1)


def pixel_features(
    network: Backbone, shards: ShardSet, pixels: Pixels, level: int, device: torch.device
) -> NDArray[np.float32]:
    """Features `(N, C)` of the sampled pixels at a level (0 the coarsest): those of the coarse pixel each lies in."""
    network = network.to(device)
    found = []
    for image, features in _passed(network, shards, pixels, level, device):
        region, places = pixels.places[image]
        side = [axis.stop - axis.start for axis in region]
        coarse: list[Any] = [axis // network.strides[level] for axis in np.unravel_index(places, side)]
        found.append(features[(slice(None), *coarse)].T)
    network.cpu()
    return np.concatenate(found)


def _passed(
    network: Backbone, shards: ShardSet, pixels: Pixels, level: int, device: torch.device
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for image, (region, _) in pixels.places.items():
        whole = torch.from_numpy(shards.read(image, region).normalised())[None]
        with torch.inference_mode():
            yield image, network(whole.to(device))[level][0].float().cpu().numpy()


def separation(features: Array, classes: Array) -> dict[str, Any]:
    """How far the features `(N, C)` of pixels are spread within classes `(N,)` and between them.

    Returns:
        `cos_within`: mean cosine of two pixels of one class, mean over classes (`by_class`: of each). `cos_between`:
        of two pixels of different classes, mean over pairs of classes. `separation`: mean squared distance of the
        class means from their mean over that of the pixels from the mean of their class; 0: classes are the same
        throughout. `silhouette`: mean over pixels, Euclidean, from -1 to 1 (Rousseeuw, 1987). `rank`: see
        `coverfast.dispersion.effective_rank`. Every class counts alike; one with a single pixel is left out.
    """
    from sklearn.metrics import silhouette_score

    kinds = [k for k in np.unique(classes) if (classes == k).sum() > 1]
    kept = np.isin(classes, kinds)
    features, classes = features[kept], classes[kept]
    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    groups = {int(k): classes == k for k in kinds}
    sums = {k: units[g].sum(axis=0) for k, g in groups.items()}
    sizes = {k: int(g.sum()) for k, g in groups.items()}
    within = {k: float((sums[k] @ sums[k] - n) / (n * (n - 1))) for k, n in sizes.items()}
    between = [float(sums[a] @ sums[b] / (sizes[a] * sizes[b])) for a, b in combinations(sums, 2)]
    means = np.stack([features[g].mean(axis=0) for g in groups.values()])
    apart = ((means - means.mean(axis=0)) ** 2).sum(axis=1).mean()
    spread = np.mean([((features[g] - m) ** 2).sum(axis=1).mean() for g, m in zip(groups.values(), means, strict=True)])
    return {
        "cos_within": float(np.mean(list(within.values()))),
        "cos_between": float(np.mean(between)),
        "separation": float(apart / max(float(spread), 1e-300)),
        "silhouette": float(silhouette_score(features, classes)),
        "rank": effective_rank(features),
        "by_class": within,
    }


def principal(features: Array) -> tuple[Array, float]:
    """The first two principal components `(N, 2)`, their largest loadings positive, and their share of the variance."""
    centred = features - features.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    main = vectors[:, ::-1][:, :2]
    main = main * np.where(np.take_along_axis(main, np.abs(main).argmax(axis=0)[None], axis=0) < 0, -1.0, 1.0)
    return centred @ main, float(values[-2:].sum() / max(values.sum(), 1e-300))


def embedded(features: Array, seed: int) -> Array:
    """The features `(N, C)` by t-SNE `(N, 2)` (van der Maaten & Hinton, 2008), perplexity 30 or a third of N."""
    from sklearn.manifold import TSNE

    method = TSNE(perplexity=min(30.0, (len(features) - 1) / 3), init="pca", random_state=seed % 2**32)
    return np.asarray(method.fit_transform(features.astype(np.float32)))


def _need_sklearn() -> None:
    """Raise `InputError` unless scikit-learn is installed."""
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise InputError("t-SNE needs the extra: pip install coverfast[study]") from error
