"""Sharing: what is saved comes back to the bit, says what it is, and says nothing of where it was made."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import socket
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from authors_checkpoint import checkpoint
from libraries import library
from strategies import randn, refused
from training_runs import make_shard, start
from typer.testing import CliRunner

from coverfast import UNet, VectorPyramid, load_backbone
from coverfast.backbones import choose, load_pyramid, read_backbone
from coverfast.backbones.files import backbone_bytes
from coverfast.cli.main import app
from coverfast.ingest import PRESETS, preprocessing
from coverfast.training.config import as_plain
from coverfast.training.settings import Settings, preset_settings

pytest.importorskip("huggingface_hub")

import huggingface_hub

from coverfast.export.facts import fingerprint
from coverfast.hub import Facts, HubBackbone, model
from coverfast.hub.preprocessing import in_words

FILES = {"README.md", "backbone.safetensors", "config.json", "curves.png"}
#: In a file of code of the user's.
OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self, in_channels, width):
        super().__init__()
        self.coarse = torch.nn.Conv2d(in_channels, width, 4, 4)
        self.fine = torch.nn.Conv2d(in_channels, width, 2, 2)

    def forward(self, x):
        return [self.coarse(x), self.fine(x)]

def factory(ndim, in_channels, width=3):
    return Net(in_channels, width)
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a shard and a finished run whose names say too much."""
    home = tmp_path_factory.mktemp("of-professor-sauerbruch")
    shard = make_shard(home / "patient-mueller.h5")
    start(shard, home / "secret-run", iterations=3, val=str(shard), val_every=3, monitor_every=1)
    return home


@pytest.fixture(scope="module")
def shared(home):
    """What is shared of that run, and the folder that it was saved in."""
    found = HubBackbone.from_run(home / "secret-run", tell=None)
    found.save_pretrained(home / "shared")
    return found, home / "shared"


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def same(a, b, x):
    return all(torch.equal(mine, other) for mine, other in zip(a(x), b(x), strict=True))


def assert_same_folder(a, b, but=""):
    assert {p.name for p in a.iterdir()} == FILES
    (tensors, metadata), (others, other) = (read_backbone(place / "backbone.safetensors") for place in (a, b))
    assert metadata == other  # in any order
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    for name in FILES - {"backbone.safetensors", but}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def read_card(folder):
    """Front matter and text."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def small(tmp_path, **about):
    """A backbone file of no run."""
    torch.manual_seed(0)
    about = {"config": {}, "preprocessing": {}} | about
    path = tmp_path / "some.safetensors"
    path.write_bytes(backbone_bytes(UNet(3, 2, (8, 16, 8)), **about))
    return path


def test_weights_that_are_not_those_of_the_card_are_told_of(shared, tmp_path):
    folder, said = tmp_path / "copy", []
    shutil.copytree(shared[1], folder)
    weights = folder / "backbone.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    HubBackbone.from_pretrained(folder, tell=said.append)
    assert any("changed since, or damaged" in text for text in said)


# --- there and back ------------------------------------------------------------------------------------------------


def test_a_run_comes_back_to_the_bit(home, shared):
    made, folder = shared
    assert {p.name for p in folder.iterdir()} == FILES
    said = []
    again = HubBackbone.from_pretrained(folder, tell=said.append)
    assert said == [f"{folder / 'backbone.safetensors'}: 72 matched, 0 missing, 0 unexpected, 0 reshaped"]
    x = randn(2, 1, 32, 48, dtype=torch.float32)
    run = load_backbone(home / "secret-run", tell=None)
    assert same(run, made, x)
    assert same(run, again, x)
    assert same(run, load_backbone(folder, tell=None), x)
    assert not again.training
    for name in ("ndim", "in_channels", "feature_channels", "strides"):
        assert getattr(again, name) == getattr(run, name)
    assert again.facts == made.facts
    assert again.curves == made.curves
    assert made.curves.startswith(b"\x89PNG")


def test_saved_again_it_is_the_same_folder(shared, tmp_path):
    _, folder = shared
    HubBackbone.from_pretrained(str(folder), tell=None).save_pretrained(tmp_path / "new" / "again")
    assert_same_folder(tmp_path / "new" / "again", folder)


def test_pyramid_travels(tmp_path):
    backbone = UNet(2, 1, (8, 8, 8))
    pyramid = VectorPyramid(2, backbone.feature_channels, (2, 1), 4, 5)
    HubBackbone(backbone, pyramid).save_pretrained(tmp_path)
    again = HubBackbone.from_pretrained(tmp_path, tell=None)
    assert again.pyramid.windows == [(5, 5)] * 2
    for found in (again.pyramid, load_pyramid(tmp_path, tell=None)):
        for name, value in found.state_dict().items():
            assert torch.equal(value, pyramid.state_dict()[name])
    assert "in the same file, for `coverfast.load_pyramid`: 2, 1 groups of 4 channels" in read_card(tmp_path)[1]


def test_own_network_needs_its_code(tmp_path):
    (tmp_path / "homeofmueller").mkdir()
    code = tmp_path / "homeofmueller" / "net.py"
    code.write_text(OWN)
    backbone = choose(f"{code}:factory", ["width=5"], ndim=2, in_channels=1).eval()
    folder = tmp_path / "shared"
    HubBackbone(backbone).save_pretrained(folder)
    with refused("own"):
        HubBackbone.from_pretrained(folder, tell=None)
    again = HubBackbone.from_pretrained(folder, own=f"{code}:factory", tell=None)
    assert same(backbone, again, randn(1, 1, 16, 8, dtype=torch.float32))
    again.save_pretrained(tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        assert json.loads((place / "config.json").read_text())["backbone"]["name"] == "net.py:factory"
        assert all(b"homeofmueller" not in p.read_bytes() for p in place.iterdir())
    assert backbone.description["name"] == f"{code}:factory"
    assert 'own="net.py:factory"' in read_card(folder)[1]


def test_network_of_another_library(tmp_path):
    library("timm")
    backbone = choose("timm:resnet10t", [], ndim=2, in_channels=1).eval()
    with torch.no_grad():
        for buffer in backbone.buffers():
            buffer.copy_(buffer + 1)
    HubBackbone(backbone).save_pretrained(tmp_path)
    again = HubBackbone.from_pretrained(tmp_path, tell=None)
    assert same(backbone, again, randn(1, 1, 64, 64, dtype=torch.float32))
    head, text = read_card(tmp_path)
    assert "timm" in head["tags"]
    assert "`resnet10t` of timm" in text
    assert "coverfast[hub,backbones]" in text


# --- the hub -------------------------------------------------------------------------------------------------------


class Hub:
    """The hub at its boundary: what would be uploaded, and what is there to download."""

    def __init__(self, place, monkeypatch):
        self.place, self.asked = place, []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr(model, "hf_hub_download", self.download)

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.asked.append((repo_id, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.place / repo_id)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(self, repo_id, filename, **options):
        if not (self.place / repo_id / filename).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: no {filename}")
        return str(self.place / repo_id / filename)


def test_push_uploads_a_whole_folder(shared, tmp_path, monkeypatch):
    hub, (made, folder) = Hub(tmp_path, monkeypatch), shared
    address = made.push_to_hub("clinic/chest", private=True, model_card_kwargs={"license": "cc-by-4.0"})
    assert address == "https://huggingface.co/clinic/chest/commit/1"
    assert hub.asked == [("clinic/chest", True)]
    assert_same_folder(tmp_path / "clinic/chest", folder, but="README.md")
    head, text = read_card(tmp_path / "clinic/chest")
    assert head["license"] == "cc-by-4.0"
    assert "Licence: cc-by-4.0." in text
    assert 'from_pretrained("clinic/chest")' in text
    again = HubBackbone.from_pretrained("clinic/chest", revision="main", tell=None)
    assert same(made, again, randn(1, 1, 32, 32, dtype=torch.float32))
    assert again.curves == made.curves
    (tmp_path / "clinic/chest" / "curves.png").unlink()
    assert HubBackbone.from_pretrained("clinic/chest", tell=None).curves is None
    (tmp_path / "clinic/chest" / "backbone.safetensors").unlink()
    with refused("clinic/chest", "backbone.safetensors", "404"):
        HubBackbone.from_pretrained("clinic/chest", tell=None)
    made.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="clinic/other", tell=None)
    assert {p.name for p in (tmp_path / "clinic/other").iterdir()} == FILES


@pytest.mark.parametrize("name", ["clinic/nothing-here", "no/such/folder", "/no/such/folder", ""])
def test_nothing_there_is_one_sentence(name, tmp_path):
    with refused("config.json", name):
        HubBackbone.from_pretrained(name, cache_dir=tmp_path, tell=None)


# --- the card ------------------------------------------------------------------------------------------------------


def test_card_says_what_it_is(home, shared):
    made, folder = shared
    head, text = read_card(folder)
    assert head["library_name"] == "coverfast"
    assert {"medical-imaging", "2d", "unet", "vector-contrastive-learning"} <= set(head["tags"])
    assert "license" not in head
    assert "Licence: none stated yet" in text
    config = json.loads((folder / "config.json").read_text())
    assert config["provenance"]["data_sha256"] in text
    assert len(config["provenance"]["data_sha256"]) == 64
    parameters = sum(p.numel() for p in made.backbone.parameters())
    for part in (
        "U-Net, channels 8-8-8-16-16-16-8-8-8",
        f"| parameters | {parameters:,} |",
        "| iterations | 3 |",
        "| crop | 32 |",
        "| started from | weights drawn at random |",
        f"torch {torch.__version__}",
        "Synthetic images (phantom)",
        "no medical device",
        "![The curves of the run](curves.png)",
    ):
        assert part in text, part
    last = [json.loads(line) for line in (home / "secret-run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"| `val_epe_ratio` | {last['val_epe_ratio']:.3g} | 3 |" in text
    assert f"after 3 iterations: **{last['val_epe_ratio']:.2f}**" in text
    assert "changed after" not in text
    assert config["settings"]["lr"] == 1e-3
    assert config["preprocessing"] == {"preset": "phantom"}
    assert config["backbone"] == made.backbone.description


def test_its_three_lines_run(shared, monkeypatch):
    _, folder = shared
    code = re.search(r"```python\n(.*?)```", read_card(folder)[1], re.DOTALL)[1]
    names = {}
    exec(code.replace("user/name", str(folder)), names)
    assert [f.shape[1] for f in names["features"]] == [16, 16, 8, 8, 8]
    assert names["features"][-1].shape[2:] == (32, 32)


def test_weights_that_changed_are_said_to(shared, tmp_path):
    again = HubBackbone.from_pretrained(shared[1], tell=None)
    with torch.no_grad():
        next(again.parameters()).mul_(1.5)
    again.save_pretrained(tmp_path / "a")
    assert "The weights were changed after the run" in read_card(tmp_path / "a")[1]
    once_more = HubBackbone.from_pretrained(tmp_path / "a", tell=None)
    once_more.save_pretrained(tmp_path / "b")
    assert "The weights were changed after the run" in read_card(tmp_path / "b")[1]


def test_without_matplotlib_there_are_no_curves(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    HubBackbone.from_run(home / "secret-run", tell=said.append).save_pretrained(tmp_path)
    assert [line for line in said if line == "no curves: drawing needs the extra: pip install coverfast[plots]"]
    assert {p.name for p in tmp_path.iterdir()} == FILES - {"curves.png"}
    assert "There is no picture of the curves." in read_card(tmp_path)[1]


def test_a_completed_card_is_kept_and_old_curves_are_not(shared, tmp_path):
    made, folder = shared
    place, said = copied(folder, tmp_path), []
    (place / "README.md").write_text("---\nlicense: mit\n---\nmine")
    HubBackbone(made.backbone).save_pretrained(place, tell=said.append)
    assert (place / "README.md").read_text().endswith("mine")
    assert said == [f"{place / 'README.md'} was there and is kept; remove it for one of these weights"]
    assert not (place / "curves.png").exists()


def test_a_file_alone_tells_little(tmp_path):
    HubBackbone.from_file(small(tmp_path), tell=None).save_pretrained(tmp_path / "shared")
    head, text = read_card(tmp_path / "shared")
    assert "vector-contrastive-learning" not in head["tags"]
    assert "COVER" not in text
    for part in ("## Training\n\nNot known.", "is not known; values from 0 to 1", "None came with the weights."):
        assert part in text
    assert "torch.rand(1, 2, 64, 64, 64)" in text


def test_a_run_folder_as_a_file_is_its_weights_alone(home):
    found = HubBackbone.from_file(home / "secret-run", tell=None)
    assert found.facts.settings["iterations"] == 3
    assert found.facts.provenance == {"started_from": "scratch"}
    assert found.facts.figures == {}


def test_an_imported_checkpoint_says_so(tmp_path):
    torch.save(checkpoint(), tmp_path / "theirs.pth")
    out = tmp_path / "backbone.safetensors"
    CliRunner().invoke(app, ["import-cover", str(tmp_path / "theirs.pth"), "--out", str(out)])
    HubBackbone.from_file(out, tell=None).save_pretrained(tmp_path / "shared")
    text = read_card(tmp_path / "shared")[1]
    assert "a checkpoint of the COVER authors' training script" in text
    sha256 = json.loads(read_backbone(out)[1]["config"])["checkpoint_sha256"]
    assert f"SHA-256 of the checkpoint: `{sha256}`" in text
    assert HubBackbone.from_pretrained(tmp_path / "shared", tell=None).pyramid.groups == (4, 3, 1)


def test_preprocessing_in_words_says_every_number():
    for preset, parameters in PRESETS.items():
        settings = preprocessing(preset)
        if preset == "raw":
            assert "as their files hold them" in in_words(settings)
            settings["size"] = 77
        text = in_words(settings)
        for name in parameters:
            value = 100 * settings[name] if name == "threshold" else settings[name]
            for number in value if isinstance(value, list) else [value]:
                assert (number if isinstance(number, str) else f"{number:g}")[:5] in text, (preset, name, text)
    assert "(own-thing)" in in_words({"preset": "own-thing"})
    assert in_words({"step": 3}).startswith("By no preset of coverfast;")


# --- what stays at home --------------------------------------------------------------------------------------------


def test_nothing_says_where_it_was_made(home, shared):
    _, folder = shared
    words = ["mueller", "sauerbruch", "secret-run", str(home), home.name, str(Path.home()), socket.gethostname()]
    words = [word for word in words if len(word) > 4]  # a picture may hold any few letters
    said = (home / "secret-run" / "config.toml").read_text()
    assert "mueller" in said  # it would have been there to find
    for path in folder.iterdir():
        content = path.read_bytes().lower()
        for word in words:
            assert word.lower().encode() not in content, (path.name, word)
    assert not {"data", "val", "run", "init"} & set(json.loads((folder / "config.json").read_text())["settings"])


def test_every_setting_was_looked_at():
    """A new setting that is a text does not travel until somebody has said that it may."""
    plain, arguments = as_plain(preset_settings("small-2d")), {"backbone_args", "method_args"}
    kept, left = Facts.of(
        {"settings": {name: "x" if value in ("", []) else value for name, value in plain.items()}}, "a file"
    )
    assert set(plain) - set(kept.settings) == {"data", "val", "run", "init", "device", *arguments}
    assert set(left) == {"data", "val", "run", "init", "device", *arguments}
    assert {f.name for f in fields(Settings)} == set(plain)


@pytest.mark.parametrize(
    "text", ["/home/mueller/x", "mueller/x.h5", "C:\\mueller", "~mueller", "a mueller", "müller", ""]
)
def test_texts_that_are_no_words_stay(text):
    about = {
        "settings": {"preset": text, "backbone": text, text: 1, "batch": [text], "crop": {"a": text}, "lr": 0.5},
        "preprocessing": {"preset": text, "script": text, "made_by": "Mueller", text: 2, "bins": [1, 2.5]},
        "provenance": {"commit": text, "host": "mueller", "device": text, "processes": 2, "started": text},
        "figures": {
            f"val_ {text}": {"last": 1, "mean": 1, "iteration": 1},
            "val_epe": {"last": text, "mean": 1, "iteration": 1},
        },
        "weights_sha256": text,
    }
    facts, left = Facts.of(about, "a file")
    kept = json.dumps(facts.as_json()).lower()
    assert "ller" not in kept
    assert facts.settings == {"backbone": "own", "lr": 0.5}
    assert facts.preprocessing == {"bins": [1, 2.5]}
    assert facts.provenance == {"processes": 2}
    assert "script" in left or not text


def test_values_that_no_preset_has_stay():
    about = {"preset": "ct", "clip": ["/home/mueller"], "spacing": 1.0}
    assert Facts.of({"preprocessing": about}, "a file")[0].preprocessing == {}
    about = {"preset": "ct", "clip": [0, 900], "spacing": 2, "who": "mueller"}
    assert Facts.of({"preprocessing": about}, "a file")[0].preprocessing == preprocessing(
        "ct", clip=[0, 900], spacing=2
    )


@pytest.mark.parametrize("path", ["/home/mueller/w.pt", "~/w.pt", "C:\\w.pt", "\\\\server\\w.pt"])
def test_a_network_made_with_a_path_is_not_shared(path, tmp_path):
    (tmp_path / "net.py").write_text(OWN.replace("width=3", "width=3, weights=None"))
    backbone = choose(f"{tmp_path / 'net.py'}:factory", [f"weights={path}"], ndim=2, in_channels=1)
    with refused("without paths", path):
        HubBackbone(backbone)


# --- damage --------------------------------------------------------------------------------------------------------


def test_fingerprint_sees_names_shapes_and_values():
    torch.manual_seed(0)
    net = UNet(2, 1, (8, 8, 8))
    before = fingerprint(net)
    assert fingerprint(net.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        net.stem[0].bias[3] += 1e-6
    assert fingerprint(net) != before


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(part, shared, tmp_path):
    place = copied(shared[1], tmp_path)
    whole = (place / "backbone.safetensors").read_bytes()
    (place / "backbone.safetensors").write_bytes(whole[: int(part * len(whole))])
    with refused("backbone.safetensors", "safetensors file"):
        HubBackbone.from_pretrained(place, tell=None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe{}", "must be JSON"),
        (b"[]", "does not say so"),
        (b'{"architectures": ["BertModel"], "backbone": "resnet50"}', "does not say so"),
        (b'{"library_name": "coverfast", "settings": [1]}', "settings of"),
        (b'{"library_name": "coverfast", "weights_sha256": 3}', "weights_sha256 of"),
    ],
)
def test_config_that_is_none(content, words, shared, tmp_path):
    place = copied(shared[1], tmp_path)
    (place / "config.json").write_bytes(content)
    with refused(words):
        HubBackbone.from_pretrained(place, tell=None)


def test_wrong_folders(home, shared, tmp_path):
    with refused("config.json", str(tmp_path), "HubBackbone.from_run"):
        HubBackbone.from_pretrained(tmp_path, tell=None)
    with refused("config.json", "HubBackbone.from_run"):
        HubBackbone.from_pretrained(home / "secret-run", tell=None)
    place = copied(shared[1], tmp_path)
    (place / "backbone.safetensors").unlink()
    with refused("no backbone.safetensors"):
        HubBackbone.from_pretrained(place, tell=None)
    for folder in (tmp_path, shared[1], home / "nothing"):
        with refused("run folder", "config.toml"):
            HubBackbone.from_run(folder, tell=None)
    with refused("no such file"):
        HubBackbone.from_file(tmp_path / "absent.safetensors", tell=None)


def test_runs_that_are_not_whole(home, tmp_path):
    run = Path(shutil.copytree(home / "secret-run", tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    found = HubBackbone.from_run(run, tell=None)
    assert found.curves is None
    assert found.facts.figures == {}
    assert "data_sha256" in found.facts.provenance
    (run / "config.toml").write_text("a = [")
    with refused("config.toml", "TOML"):
        HubBackbone.from_run(run, tell=None)
    (run / "config.toml").write_text("provenance = 3")
    with refused("provenance of"):
        HubBackbone.from_run(run, tell=None)
    (run / "backbone.safetensors").unlink()
    with refused("finished pretraining run", "backbone.safetensors"):
        HubBackbone.from_run(run, tell=None)


def test_a_folder_that_cannot_be_written(shared, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with refused("cannot be written", "file"):
            shared[0].save_pretrained(place)


def test_a_missing_extra_is_one_sentence(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("coverfast.hub")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused("the hub needs the extra: pip install coverfast[hub]"):
        importlib.import_module("coverfast.hub")
