"""A backbone as a model of the Hugging Face hub."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
except ImportError as error:
    from coverfast.checks import InputError

    raise InputError("the hub needs the extra: pip install coverfast[hub]") from error

from coverfast.backbones import Backbone, backbone_file, load_backbone, load_pyramid, read_backbone
from coverfast.backbones.files import Tell, backbone_bytes, described
from coverfast.checks import InputError, require
from coverfast.disk import explained, write_atomically
from coverfast.export.facts import Facts, figures_of, fingerprint, shareable
from coverfast.hub.card import card_text, tags
from coverfast.pyramid import VectorPyramid
from coverfast.report import load_metrics
from coverfast.report.curves import curves_sheet
from coverfast.report.sheet import need_matplotlib
from coverfast.training.runs import Run

WEIGHTS, CONFIG, CARD, CURVES = "backbone.safetensors", "config.json", "README.md", "curves.png"
#: Of the curves: what says nothing of the weights that the settings do not.
_LEFT_OUT = ("data_wait", "lr")


class HubBackbone(nn.Module, ModelHubMixin):
    """A backbone that knows how its weights came about, to save in a folder, share on the hub and load again.

    `from_run`, `from_file` and `from_pretrained` make one. The folder of `save_pretrained` holds the weights in
    `backbone.safetensors`, which `coverfast.load_backbone` reads too, `config.json`, a model card and the curves of the
    run; nothing in it is pickled, and nothing names a path of the machine or a file of the data.

    Args:
        backbone: the network.
        pyramid: the vector pyramid it was trained with, if that is to travel too.
        facts: how the weights came about.
        curves: the curves of the run, a PNG.

    Attributes:
        ndim: 2 or 3 spatial axes.
        in_channels: channels of the image.
        feature_channels: channels of the maps, coarse to fine.
        strides: pixels of the image per pixel of each map, coarse to fine.
    """

    def __init__(
        self,
        backbone: Backbone,
        pyramid: VectorPyramid | None = None,
        facts: Facts | None = None,
        curves: bytes | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid = shareable(backbone), pyramid
        self.facts, self.curves = facts or Facts(), curves
        self.ndim, self.in_channels = backbone.ndim, backbone.in_channels
        self.feature_channels, self.strides = backbone.feature_channels, backbone.strides

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of images `(B, in_channels, *S)`, coarse to fine; `S` divisible by the coarsest stride."""
        return self.backbone(x)

    # --- from what there is ---

    @classmethod
    def from_run(cls, folder: str | Path, *, own: str | None = None, tell: Tell | None = print) -> Self:
        """The backbone of a finished pretraining run, with its settings, data hash, figures and curves.

        Without matplotlib there are no curves.

        Args:
            folder: of the run.
            own: see `coverfast.load_backbone`.
            tell: takes lines: the load report, and the names of the settings that do not travel.

        Raises:
            InputError: when the folder is no run or the run has not finished.
        """
        run = Run(Path(folder))
        require(run.config.is_file(), f"{folder} must be a run folder, but it has no {run.config.name}")
        require(run.backbone.is_file(), f"{folder} must be a finished pretraining run, but it has no {WEIGHTS}")
        with explained(run.config, "read"):
            data = run.config.read_bytes()
        try:
            provenance = tomllib.loads(data.decode()).get("provenance", {})
        except ValueError as error:
            raise InputError(f"{run.config} must be a TOML file, but it is none: {error}") from None
        metrics = load_metrics(run.metrics) if run.metrics.is_file() else {}
        more = {"provenance": provenance, "figures": figures_of(metrics)}
        return cls._from_weights(run.backbone, more, _curves(metrics, tell), own=own, tell=tell)

    @classmethod
    def from_file(cls, path: str | Path, *, own: str | None = None, tell: Tell | None = print) -> Self:
        """The backbone of a `backbone.safetensors` with the settings and the preprocessing that it holds.

        Arguments and errors as those of `coverfast.load_backbone`.
        """
        return cls._from_weights(Path(path), {}, None, own=own, tell=tell)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        own: str | None = None,
        tell: Tell | None = print,
    ) -> Self:
        """The backbone of a folder of `save_pretrained`, or of a repository of the hub, `user/name`; evaluating.

        Nothing that comes with it is executed.

        Args:
            pretrained_model_name_or_path: the folder or the repository.
            force_download: download again what the cache holds.
            token: for a repository that is not public.
            cache_dir: of what was downloaded.
            local_files_only: take what the cache holds, without looking on the hub.
            revision: branch, tag or commit.
            own: see `coverfast.load_backbone`.
            tell: takes the load report.

        Raises:
            InputError: when there is none, or a file of it is damaged.
        """
        name = str(pretrained_model_name_or_path)
        options: dict[str, Any] = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
        options |= {"local_files_only": local_files_only, "revision": revision}
        about = _read_config(_file(name, CONFIG, options), name)
        weights = _file(name, WEIGHTS, options)
        try:
            curves: bytes | None = _file(name, CURVES, options).read_bytes()
        except (InputError, OSError):
            curves = None
        return cls._from_weights(weights, about, curves, own=own, tell=tell)

    @classmethod
    def _from_weights(
        cls, path: Path, more: dict[str, Any], curves: bytes | None, *, own: str | None, tell: Tell | None
    ) -> Self:
        """A backbone file with what else is known."""
        path = backbone_file(path)
        backbone = load_backbone(path, own=own, tell=tell)
        _, metadata = read_backbone(path)
        with described(path):
            about = {"settings": json.loads(metadata["config"]), "preprocessing": json.loads(metadata["preprocessing"])}
        pyramid = load_pyramid(path, tell=tell) if "pyramid" in metadata else None
        digest = fingerprint(backbone)
        facts, left = Facts.of({"weights_sha256": digest, **about, **more}, str(path))
        if left and tell:
            tell(f"{path}: stay out of what is shared: {', '.join(left)}")
        if tell and facts.weights_sha256 not in ("", digest):
            tell(f"warning: {path}: the weights are not those that its facts are about: changed since, or damaged")
        return cls(backbone, pyramid, facts, curves).eval()

    # --- to a folder and to the hub ---

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, tell: Tell | None = print, **options: Any
    ) -> str | None:
        """Save `backbone.safetensors`, `config.json`, `README.md` and `curves.png` in a folder.

        A README.md that is there is kept: it may be a card that somebody completed.

        Args:
            save_directory: the folder; made where it is not there.
            tell: takes a line where a card was kept.
            options: of huggingface_hub's `ModelHubMixin.save_pretrained`; `model_card_kwargs={"license": "cc-by-4.0"}`
                states a licence, which is otherwise left open.

        Raises:
            InputError: when it cannot be written.
        """
        folder = Path(save_directory)
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if tell and (folder / CARD).exists():
            tell(f"{folder / CARD} was there and is kept; remove it for one of these weights")
        return super().save_pretrained(folder, **options)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> str:
        """Upload the folder of `save_pretrained` to a repository of the hub, which is made where it is not there.

        Args:
            repo_id: `user/name`.
            model_card_kwargs: see `save_pretrained`.
            options: of huggingface_hub's `ModelHubMixin.push_to_hub`, such as `private=True`.

        Returns:
            The address of the commit.
        """
        return super().push_to_hub(
            repo_id, model_card_kwargs={"repo_id": repo_id, **(model_card_kwargs or {})}, **options
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        facts = self.facts
        about = {"config": facts.settings, "preprocessing": facts.preprocessing}
        write_atomically(save_directory / WEIGHTS, backbone_bytes(self.backbone, pyramid=self.pyramid, **about))
        config = {"library_name": "coverfast", "backbone": self.backbone.description, **facts.as_json()}
        write_atomically(save_directory / CONFIG, json.dumps(config, indent=2) + "\n")
        if self.curves is not None:
            write_atomically(save_directory / CURVES, self.curves)
        else:
            (save_directory / CURVES).unlink(missing_ok=True)

    def generate_model_card(self, *, repo_id: str = "", license: str | None = None) -> ModelCard:  # type: ignore[override]
        """The model card: what the network is, how it came about, how it is loaded, and what it is not good for."""
        head = ModelCardData(
            library_name="coverfast",
            license=license,
            pipeline_tag="image-feature-extraction",
            tags=tags(self.backbone, self.facts),
        )
        known = bool(self.facts.weights_sha256)
        text = card_text(
            self.backbone,
            self.pyramid,
            self.facts,
            changed=known and self.facts.weights_sha256 != fingerprint(self.backbone),
            curves=CURVES if self.curves is not None else "",
            repo_id=repo_id,
            license=license,
        )
        return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")


def _curves(metrics: Any, tell: Tell | None) -> bytes | None:
    """The picture of the curves, None where nothing is to be drawn or nothing can draw it."""
    if not metrics:
        return None
    try:
        need_matplotlib()
    except InputError as error:
        if tell:
            tell(f"no curves: {error}")
        return None
    sheet = curves_sheet({name: values for name, values in metrics.items() if name not in _LEFT_OUT})
    return sheet.png() if sheet else None


def _file(name: str, file: str, options: dict[str, Any]) -> Path:
    """A file of a folder or of a repository."""
    if Path(name).is_dir():
        path = Path(name) / file
        require(
            path.is_file(),
            f"{name} must be a folder that save_pretrained wrote, but it has no {file}; of a run: HubBackbone.from_run",
        )
        return path
    try:
        return Path(hf_hub_download(name, file, **options))
    except (EntryNotFoundError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:120]
        raise InputError(
            f"{name} must be a folder, or a repository of the hub, that HubBackbone wrote, but its {file} is not to be "
            f"had: {first}"
        ) from error


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{CONFIG} of {name} must be JSON, but it cannot be read: {error}") from None
    ours = isinstance(about, dict) and about.get("library_name") == "coverfast"
    require(ours, f"{name} must be weights that HubBackbone saved, but its {CONFIG} does not say so")
    return about
