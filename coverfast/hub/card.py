"""The model card of a backbone, in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from coverfast.backbones import Backbone, UNet
from coverfast.backbones.base import title
from coverfast.export.facts import Facts
from coverfast.hub.preprocessing import in_words
from coverfast.pyramid import VectorPyramid
from coverfast.report.metrics import meaning

_LIBRARIES = {"timm": "timm", "monai": "MONAI", "smp": "segmentation_models_pytorch"}
#: Settings that a reader asks for first; config.json has all.
_SHOWN = (
    *("method", "method_args", "preset", "iterations", "batch", "crop", "strength", "foreground"),
    *("groups", "head_dim", "window"),
    *("optimizer", "lr", "schedule", "warmup", "weight_decay", "clip", "ema", "seed"),
)
#: Patterns of the figures that are shown, in order.
_FIGURES = ("val_epe_ratio", "val_(?!loss|mask).+", "epe_ratio", "ncc", "loss.*", "rank.*", "cos_random", "cos_near")
_IMPORTED = "import-cover"
_COVER = "vector contrastive learning (COVER, ICCV 2025)"
_METHODS = {
    "cover": _COVER,
    "gvsl": "geometric visual similarity learning (GVSL, CVPR 2023)",
    "own": "a method of its author's own",
}

_LIMITS = (
    "For research. It is no medical device, and nothing here says that it is of use in the care of patients.",
    "The figures say how well the task of pretraining is done, not how well any other one will be: fine-tune it and "
    "evaluate that.",
    "Images of another kind, or made in another way, are not what it learned from.",
    "A network can keep traces of the images it learned from. Whoever shares it answers for the right to do so.",
)


def tags(backbone: Backbone, facts: Facts) -> list[str]:
    """Words to find it by."""
    found = ["coverfast", "medical-imaging", "self-supervised-learning", "dense-features", f"{backbone.ndim}d"]
    return [*found, str(backbone.description["kind"]), *(["vector-contrastive-learning"] if _by_cover(facts) else [])]


def card_text(
    backbone: Backbone,
    pyramid: VectorPyramid | None,
    facts: Facts,
    *,
    changed: bool,
    curves: str,
    repo_id: str,
    license: str | None,
) -> str:
    """The card without its front matter.

    Args:
        backbone: the network.
        pyramid: that travels with it.
        facts: how the weights came about.
        changed: whether they are others by now.
        curves: name of the picture beside the card, "" for none.
        repo_id: where it is to be found on the hub, "" where that is not known.
        license: its name, None where nobody has chosen one.
    """
    licence = license or "none stated yet; whoever shares the weights chooses it, `license:` at the head of this card"
    sections = {
        "Load": _loading(backbone, facts, repo_id),
        "Network": _network(backbone, pyramid),
        "Training": _training(facts, changed),
        "Images": _images(facts),
        "Figures": _figures(facts, curves),
        "Limits": "\n".join(f"- {text}" for text in (*_LIMITS, f"Licence: {licence}.")),
    }
    network = "U-Net" if isinstance(backbone, UNet) else title(backbone.description)
    head = f"# {network} for {backbone.ndim}D medical images\n\n{_summary(backbone, facts)}\n"
    return head + "".join(f"\n## {name}\n\n{text}\n" for name, text in sections.items())


def _imported(facts: Facts) -> bool:
    return facts.settings.get("source") == _IMPORTED


def _by_cover(facts: Facts) -> bool:
    return _imported(facts) or (bool(facts.settings) and facts.settings.get("method", "cover") == "cover")


def _summary(backbone: Backbone, facts: Facts) -> str:
    channels = "one channel" if backbone.in_channels == 1 else f"{backbone.in_channels} channels"
    text = f"Maps {backbone.ndim}D images of {channels} to {len(backbone.strides)} feature maps, coarse to fine. "
    if _imported(facts):
        return (
            f"{text}The weights are those of a checkpoint of the COVER authors' training script, in coverfast's layout."
        )
    if not facts.settings:
        return f"{text}Saved by coverfast."
    method = facts.settings.get("method", "cover")
    text += f"Pretrained without labels by {_METHODS.get(method, method)}, with coverfast."
    if ratio := facts.figures.get("val_epe_ratio"):
        text += (
            f" End-point ratio on held-out images after {ratio['iteration']:,.0f} iterations: **{ratio['last']:.2f}**"
            " (0: displacements are found exactly, 1: no better than none)."
        )
    return text


def _loading(backbone: Backbone, facts: Facts, repo_id: str) -> str:
    kind, place = backbone.description["kind"], repo_id if "/" in repo_id else "user/name"
    own = ', own="net.py:factory"' if kind == "own" else ""
    shape = _listed((1, backbone.in_channels, *_image_size(backbone, facts)))
    extras = "hub,backbones" if kind in _LIBRARIES else "hub"
    what = f"{len(backbone.strides)} maps of {_listed(backbone.feature_channels)} channels"
    lines = [
        "```python",
        "import torch",
        "from coverfast.hub import HubBackbone",
        "",
        f'backbone = HubBackbone.from_pretrained("{place}"{own})  # or a folder of these files',
        f"features = backbone(torch.rand({shape}))  # {what}",
        "```",
        "",
        f"This needs `coverfast[{extras}]`. The file `backbone.safetensors` alone does for `coverfast.load_backbone` "
        "and `coverfast finetune --init`; its tensors have the names of the network's own state dict.",
    ]
    if own:
        lines.append("The network is code of its author and no part of this: `own` says where it lies.")
    return "\n".join(lines)


def _image_size(backbone: Backbone, facts: Facts) -> list[int]:
    """Of the views it learned from, where they fit; else a small one that does."""
    crop, stride = facts.settings.get("crop"), backbone.strides[0]
    sides: list[Any] = list(crop) if isinstance(crop, (list, tuple)) else [crop]
    sides = sides * backbone.ndim if len(sides) == 1 else sides
    fits = len(sides) == backbone.ndim and all(isinstance(s, int) and s > 0 and s % stride == 0 for s in sides)
    return sides if fits else [max(64 // stride, 2) * stride] * backbone.ndim


def _network(backbone: Backbone, pyramid: VectorPyramid | None) -> str:
    description = backbone.description
    what = f"`{description.get('name')}`, its author's own"
    if isinstance(backbone, UNet):
        what = f"U-Net, channels {'-'.join(map(str, backbone.channels))}"
    elif description["kind"] in _LIBRARIES:
        what = f"`{description['name']}` of {_LIBRARIES[description['kind']]}"
    rows = {"architecture": what}
    if args := description.get("args"):
        rows["arguments"] = _listed(f"`{name}={value!r}`" for name, value in args.items())
    rows |= {
        "parameters": f"{sum(p.numel() for p in backbone.parameters()):,}",
        "images": f"{backbone.ndim}D, {backbone.in_channels} channel(s), sides divisible by {backbone.strides[0]}",
        "channels of the maps": _listed(backbone.feature_channels),
        "strides of the maps": _listed(backbone.strides),
    }
    if pyramid is not None:
        windows = _listed("x".join(map(str, window)) for window in pyramid.windows)
        rows["vector pyramid"] = (
            f"in the same file, for `coverfast.load_pyramid`: {_listed(pyramid.groups)} groups of {pyramid.head_dim} "
            f"channels, windows {windows}"
        )
    return _table(("network", ""), rows.items())


def _training(facts: Facts, changed: bool) -> str:
    settings, origin = facts.settings, facts.provenance
    warning = "**The weights were changed after the run that is described here.**\n\n" if changed else ""
    if _imported(facts):
        checkpoint = settings.get("checkpoint_sha256", "not known")
        return f"{warning}Not known. SHA-256 of the checkpoint: `{checkpoint}`."
    if not settings:
        return f"{warning}Not known."
    rows = {
        name: _listed(v) if isinstance(v := settings[name], list) else str(v) for name in _SHOWN if name in settings
    }
    if start := origin.get("started_from"):
        rows["started from"] = "weights drawn at random" if start == "scratch" else "other weights"
    rows["SHA-256 of the data"] = f"`{origin['data_sha256']}`" if "data_sha256" in origin else "not known"
    versions = [f"{name} {origin[name]}" for name in ("coverfast", "torch", "python") if name in origin]
    versions += [f"commit `{origin['commit']}`"] if origin.get("commit") else []
    rows["versions"] = _listed(versions) or "not known"
    if "device" in origin:
        ran = [
            origin["device"],
            f"{origin.get('processes', 1)} process(es)",
            origin.get("precision"),
            origin.get("day"),
        ]
        rows["ran on"] = _listed(v for v in ran if v)
    return f"{warning}{_table(('setting', 'value'), rows.items())}\n\nAll settings: `config.json`."


def _images(facts: Facts) -> str:
    if not facts.preprocessing:
        return "How the images were made that it learned from is not known; values from 0 to 1 enter the network."
    return (
        f"**What it learned from, and expects.** {in_words(facts.preprocessing)}\n\n"
        f"As the shards said it: `{json.dumps(facts.preprocessing)}`."
    )


def _figures(facts: Facts, curves: str) -> str:
    figures = facts.figures
    known = [name for name in figures if meaning(name)]
    names = dict.fromkeys(name for pattern in _FIGURES for name in known if re.fullmatch(pattern, name))
    rows = []
    for name in names:
        # What every iteration says anew is told by a mean.
        value, how = ("mean", "; mean of the last 50") if name.startswith(("loss", "epe")) else ("last", "")
        row = figures[name]
        rows.append((f"`{name}`", f"{row[value]:.3g}", f"{row['iteration']:.0f}", meaning(name) + how))
    table = _table(("figure", "value", "iteration", "what it is"), rows) if rows else "None came with the weights."
    picture = f"![The curves of the run]({curves})" if curves else "There is no picture of the curves."
    return f"{table}\n\n{picture}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ([cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
