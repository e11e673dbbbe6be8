"""Runs exported files where coverfast cannot be imported: `python -I outside_coverfast.py FOLDER PLAIN_UNET`.

The folder holds network.{safetensors,ts,pt2,onnx} and expected.pt, images with their features. Prints JSON: for every
format the largest difference of a map over its largest value, image by image, and what the files say of themselves.
"""

import importlib.util
import json
import sys
from pathlib import Path


class Absent:
    """Nothing of that name is to be found."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "coverfast":
            raise ModuleNotFoundError(f"no {name} here", name=name)


sys.meta_path.insert(0, Absent())
try:
    import coverfast
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(f"coverfast can be imported: {coverfast}")

import onnxruntime  # noqa: E402
import torch  # noqa: E402

folder, plain_unet = Path(sys.argv[1]), sys.argv[2]
spec = importlib.util.spec_from_file_location("plain_unet", plain_unet)
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)
session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
said = {"ts": {"coverfast.json": ""}, "pt2": {"coverfast.json": ""}}
runs = {
    "safetensors": plain.load(folder / "network.safetensors"),
    "ts": torch.jit.load(folder / "network.ts", _extra_files=said["ts"]),
    "pt2": torch.export.load(folder / "network.pt2", extra_files=said["pt2"]).module(),
    "onnx": lambda image: [torch.from_numpy(f) for f in session.run(None, {"image": image.numpy()})],
}
about = {name: json.loads(files["coverfast.json"]) for name, files in said.items()}
about["onnx"] = dict(session.get_modelmeta().custom_metadata_map)
differences = {name: [] for name in runs}
with torch.no_grad():
    for image, expected in torch.load(folder / "expected.pt"):
        for name, run in runs.items():
            found = run(image)
            assert [f.shape for f in found] == [f.shape for f in expected], name
            parts = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
            differences[name].append(max(parts))
assert not [name for name in sys.modules if name.partition(".")[0] == "coverfast"]
shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
print(json.dumps({"differences": differences, "about": about, "shapes": shapes}))
