"""tools/install_detectron2.py: what it mends, what it leaves alone, and its errors."""

import base64
import csv
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "install_detectron2.py"
spec = importlib.util.spec_from_file_location("install_detectron2", TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

# Each mended file: lines of release 0.6, and what they have to become.
BEFORE_AFTER = {
    "data/common.py": (
        "cur_idx = self._rng.sample(self._fallback_candidates, k=1)[0]",
        "cur_idx = self._rng.sample(list(self._fallback_candidates), k=1)[0]",
    ),
    "data/transforms/transform.py": ("a=Image.LINEAR, b=0", "a=Image.BILINEAR, b=0"),
    "engine/train_loop.py": (
        "from torch.cuda.amp import GradScaler\ns = GradScaler()\n"
        "from torch.cuda.amp import autocast\nwith autocast():\n",
        'from torch.amp import GradScaler\ns = GradScaler("cuda")\n'
        'from torch.amp import autocast\nwith autocast("cuda"):\n',
    ),
    "evaluation/coco_evaluation.py": (
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "        self._use_fast_impl = use_fast_impl\n"
        "        use_fast_impl=self._use_fast_impl,\n",
        "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:  # it is compiled\n    COCOeval_opt = COCOeval\n"
        "        self._use_fast_impl = use_fast_impl and COCOeval_opt is not COCOeval\n"
        "        use_fast_impl=self._use_fast_impl,\n",
    ),
    "export/__init__.py": (
        "from .api import *\nfrom .flatten import TracingAdapter\n",
        "try:\n    from .api import *\nexcept ImportError:  # it needs caffe2\n    pass\n"
        "from .flatten import TracingAdapter\n",
    ),
    "layers/mask_ops.py": ("np.array(mask, copy=False)", "np.asarray(mask)"),
    "model_zoo/model_zoo.py": (
        "import pkg_resources\nimport torch\n    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )\n',
        "from importlib import resources\nimport torch\n    cfg_file = "
        'str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))\n',
    ),
    "modeling/anchor_generator.py": (
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
}
ALIASES = ("np.bool, np.int, np.float, np.str, np.bool_", "bool, int, float, str, np.bool_")
BEFORE_AFTER |= {f"{name}.py": ALIASES for name in tool.NUMPY_FILES}
OPERATORS = ("from detectron2 import _C", "from detectron2.layers.compiled import _C")
for name in ("deform_conv", "roi_align_rotated", "rotated_boxes"):
    BEFORE_AFTER[f"layers/{name}.py"] = OPERATORS


@pytest.fixture
def source(tmp_path):
    """A source tree with the lines to mend, and the other files that build_wheel reads."""
    root = tmp_path / "source"
    files = {f"{package}/__init__.py": "" for package in tool.PACKAGES}
    files |= {f"detectron2/{file}": before for file, (before, _) in BEFORE_AFTER.items()}
    files["detectron2/model_zoo/configs/Base.yaml"] = "VERSION: 2\n"
    files |= {"detectron2/README.md": "not for the wheel", "LICENSE": "Apache License"}
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root


def failed(stderr):
    return subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)


def test_every_mend_or_none(source):
    assert {f"detectron2/{file}" for file in BEFORE_AFTER} == set(tool.MENDS)
    first, *_, last = (source / file for file in tool.MENDS)
    before, text = first.read_text(), last.read_text()
    changes = {".* is not found in it": lambda: last.write_text("other text")}
    for words, change in {**changes, "is missing": last.unlink}.items():
        change()
        with pytest.raises(tool.InstallError, match=f"^{last.relative_to(source)}:? {words}"):
            tool.mend(source)
        assert first.read_text() == before and not (source / tool.COMPILED_FILE).exists()
    last.write_text(text)
    tool.mend(source)
    for file, (_, after) in BEFORE_AFTER.items():
        assert (source / "detectron2" / file).read_text() == after, file
    assert (source / tool.COMPILED_FILE).read_text() == tool.COMPILED_TEXT
    with pytest.raises(tool.InstallError, match="mended already"):
        tool.mend(source)


def test_the_stand_in_raises_only_when_an_operator_is_called(monkeypatch):
    detectron2 = types.ModuleType("detectron2")
    monkeypatch.setitem(sys.modules, "detectron2", detectron2)
    names = {}
    exec(tool.COMPILED_TEXT, names)
    assert not hasattr(names["_C"], "__file__")
    with pytest.raises(ImportError, match="detectron2._C.box_iou_rotated is a compiled operator"):
        _ = names["_C"].box_iou_rotated

    detectron2._C = types.SimpleNamespace(box_iou_rotated=max)
    exec(tool.COMPILED_TEXT, names)
    assert names["_C"].box_iou_rotated(1, 2) == 2


def test_wheel_records_its_files_and_pip_installs_it(source, tmp_path):
    tool.mend(source)
    path = tool.build_wheel(source, tmp_path)
    assert path.name == "detectron2-0.6-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        info = "detectron2-0.6.dist-info"
        rows = list(csv.reader(archive.read(f"{info}/RECORD").decode().splitlines()))
        assert {row[0] for row in rows} == names
        for name, digest, size in rows[:-1]:
            data = archive.read(name)
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
            assert (digest, size) == (f"sha256={sha256.rstrip('=')}", str(len(data)))
        assert "Requires-Dist: fvcore>=0.1.5,<0.1.6\n" in archive.read(f"{info}/METADATA").decode()
    assert "detectron2/model_zoo/configs/Base.yaml" in names
    assert "detectron2/projects/point_rend/__init__.py" in names
    assert "detectron2/README.md" not in names

    target = tmp_path / "target"
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    process = tool.run("-m", "pip", "install", *options, str(path))
    assert process.returncode == 0, process.stderr
    (found,) = tool.importlib.metadata.distributions(name="detectron2", path=[str(target)])
    assert found.version == "0.6"


def test_a_wrong_archive_gives_one_sentence_and_writes_nothing(tmp_path):
    sdist, wheels = tmp_path / "pb1-detectron2-0.6.tar.gz", tmp_path / "wheels"
    sdist.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    tool.check_sha256(sdist, digest)
    command = [sys.executable, TOOL, "--sdist", sdist, "--wheel-dir", wheels]
    process = subprocess.run(command, text=True, capture_output=True)
    assert process.returncode == 1
    start = f"install_detectron2: {sdist.name} has the sha256 {digest}, not 5d2e"
    assert process.stderr.startswith(start)
    assert process.stderr.count("\n") == 1 and not wheels.exists()


def test_a_failed_download_is_reported_with_its_reason(tmp_path, monkeypatch):
    environment = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    for name, value in {**environment, "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tool.InstallError, match=r"is a package index reachable.*\(ERROR: "):
        tool.download(tmp_path)
    refused = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n    Got 1"
    results = iter([subprocess.CompletedProcess([], 0, "", ""), failed(refused)])
    monkeypatch.setattr(tool, "run", lambda *command, first=None: next(results))
    with pytest.raises(tool.InstallError, match=r"0.6 with the sha256 5d2e.* \(ERROR: THESE .*\)$"):
        tool.download(tmp_path)


@pytest.mark.parametrize(
    ("torch", "made_by", "words"),
    [
        (False, "", "PyTorch is missing here"),
        (True, "", r"pip uninstall detectron2.*\(ImportError: libcud"),  # another's is kept
        (True, "install_detectron2 (other mends)", "^downloading$"),  # ours, outdated
        (True, tool.generator(), "^downloading$"),  # ours, broken
    ],
)
def test_what_is_replaced(monkeypatch, torch, made_by, words):
    def download(folder):
        raise tool.InstallError("downloading")

    error = "Traceback (most recent call last):\nImportError: libcudart.so.9 is missing\n"
    monkeypatch.setattr(tool, "installed_generator", lambda: made_by)
    monkeypatch.setattr(tool, "installed", lambda module: torch)
    monkeypatch.setattr(tool, "run", lambda *command: failed(error))
    monkeypatch.setattr(tool, "download", download)
    with pytest.raises(tool.InstallError, match=words):
        tool.install()


@pytest.mark.skipif(
    tool.installed_generator() not in ("", tool.generator()),
    reason="the installed Detectron2 has other mends: 'make test' replaces it first",
)
def test_a_working_detectron2_is_left_alone():
    folder = Path(importlib.util.find_spec("detectron2").origin).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.py")}
    process = subprocess.run([sys.executable, TOOL], text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(r"detectron2 \S+ works here already: left as it is\.\n", process.stdout)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.py")} == before


# Not by its metadata: git main may come first on PYTHONPATH, before an installed 0.6.
DETECTRON2 = importlib.util.find_spec("detectron2")


@pytest.mark.skipif(
    not DETECTRON2 or not (Path(DETECTRON2.origin).parents[1] / tool.COMPILED_FILE).exists(),
    reason="the Detectron2 that is imported was not mended by this tool",
)
def test_the_installed_detectron2_is_mended():
    import torch
    from detectron2.evaluation import coco_evaluation
    from detectron2.export import TracingAdapter
    from detectron2.layers import DeformConv, ROIAlignRotated
    from detectron2.model_zoo import get_config
    from pycocotools.cocoeval import COCOeval

    assert coco_evaluation.COCOeval_opt is COCOeval
    assert TracingAdapter
    assert get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    with pytest.raises(ImportError, match="roi_align_rotated_forward is a compiled operator"):
        ROIAlignRotated((2, 2), 1.0, 0)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 6))
    # Zero offsets make it a plain convolution, and torchvision has that operator.
    layer, image = DeformConv(1, 1, 3, padding=1), torch.rand(1, 1, 4, 4)
    plain = torch.nn.functional.conv2d(image, layer.weight, padding=1)
    assert torch.allclose(layer(image, torch.zeros(1, 18, 4, 4)), plain, atol=1e-6)
