#!/usr/bin/env python3
"""Install Detectron2 0.6 into the Python that runs this file, mended for today's libraries.

    python tools/install_detectron2.py

A Detectron2 that works is left alone, whatever its version and however it was built. Where there
is none, pip fetches the source of release 0.6 from the package index (published there as
``pb1-detectron2``); its sha256 is checked, the mends below are applied (each follows a change the
Detectron2 project made after the release), and the result is installed as an ordinary pure-Python
wheel. It has no compiled operators: boxes, masks and keypoints need none, and what does need one
(rotated boxes, for instance) raises an ImportError when called.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROJECT, VERSION = "pb1-detectron2", "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# What pip needs to read the source, whatever the environment has: pip 26.3 refuses its metadata,
# and its setup.py wants setuptools.
BUILD_TOOLS = ["pip==25.3", "setuptools<82", "wheel"]

REQUIRES = """torch torchvision numpy Pillow>=7.1 matplotlib pycocotools>=2.0.2 termcolor>=1.1
yacs>=0.1.8 tabulate cloudpickle tqdm>4.29.0 tensorboard fvcore>=0.1.5,<0.1.6 iopath>=0.1.7
omegaconf>=2.1 hydra-core>=1.1""".split()

# Folders of the source, and where they go in the wheel.
PACKAGES = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}

PROBE = """
import detectron2, detectron2.data, detectron2.engine, detectron2.evaluation
import detectron2.model_zoo, detectron2.modeling
print("\\ndetectron2", detectron2.__version__)
"""

# One more file for the wheel: what the operators call where nothing was compiled.
COMPILED_FILE = "detectron2/layers/compiled.py"
COMPILED_TEXT = '''\
"""The compiled operators, or a stand-in that says what is missing when one is called."""

try:
    from detectron2 import _C
except ImportError:

    class _NotCompiled:
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError(
                f"detectron2._C.{name} is a compiled operator, and this Detectron2 was installed "
                "without any: it takes a Detectron2 built from source."
            )

    _C = _NotCompiled()
'''

# numpy 1.24 dropped its aliases of the builtin types.
NUMPY = (r"\bnp\.(bool|int|float|str|object)\b", r"\1")
OPTIONAL_C = (r"^from detectron2 import _C$", "from detectron2.layers.compiled import _C")

# file of the source: (pattern, replacement), ...
MENDS = {
    "detectron2/data/build.py": [NUMPY],
    "detectron2/data/datasets/pascal_voc.py": [NUMPY],
    "detectron2/evaluation/pascal_voc_evaluation.py": [NUMPY],
    "detectron2/evaluation/sem_seg_evaluation.py": [NUMPY],
    "detectron2/structures/masks.py": [NUMPY],
    "detectron2/utils/video_visualizer.py": [NUMPY],
    "detectron2/utils/visualizer.py": [NUMPY],
    # In numpy 2, copy=False means "fail when a copy is needed".
    "detectron2/layers/mask_ops.py": [(r"np\.array\(mask, copy=False\)", "np.asarray(mask)")],
    # Pillow 10 dropped Image.LINEAR, the old name of Image.BILINEAR.
    "detectron2/data/transforms/transform.py": [(r"\bImage\.LINEAR\b", "Image.BILINEAR")],
    # Since Python 3.11, random.sample takes no set.
    "detectron2/data/common.py": [
        (r"\.sample\(self\._fallback_candidates,", ".sample(list(self._fallback_candidates),"),
    ],
    # The compiled operators are optional; without them COCOEvaluator uses pycocotools.
    "detectron2/layers/deform_conv.py": [OPTIONAL_C],
    "detectron2/layers/roi_align_rotated.py": [OPTIONAL_C],
    "detectron2/layers/rotated_boxes.py": [OPTIONAL_C],
    "detectron2/evaluation/coco_evaluation.py": [
        (
            r"^(from detectron2\.evaluation\.fast_eval_api import COCOeval_opt)$",
            r"try:\n    \1\nexcept ImportError:  # it is compiled\n    COCOeval_opt = COCOeval",
        ),
        (
            r"(self\._use_fast_impl = use_fast_impl)$",
            r"\1 and COCOeval_opt is not COCOeval",
        ),
    ],
    # torch 2 has no caffe2: what needs it in detectron2.export is left out.
    "detectron2/export/__init__.py": [
        (
            r"^(from \.api import \*)$",
            r"try:\n    \1\nexcept ImportError:  # it needs caffe2\n    pass",
        ),
    ],
    # setuptools 82 dropped pkg_resources.
    "detectron2/model_zoo/model_zoo.py": [
        (r"^import pkg_resources$", "from importlib import resources"),
        (
            r'pkg_resources\.resource_filename\(\s*("[\w.]+"), os\.path\.join\((.*)\)\s*\)',
            r"str(resources.files(\1).joinpath(\2))",
        ),
    ],
    # torch 2 warns of these, at the start or at every step.
    "detectron2/modeling/anchor_generator.py": [
        (r"meshgrid\(shifts_y, shifts_x\)", 'meshgrid(shifts_y, shifts_x, indexing="ij")'),
    ],
    "detectron2/engine/train_loop.py": [
        (r"torch\.cuda\.amp import", "torch.amp import"),
        (r"\b(GradScaler|autocast)\(\)", r'\1("cuda")'),
    ],
}


class InstallError(Exception):
    """What went wrong, in a sentence the user can act on."""


def check_sha256(path: Path, expected: str = SHA256) -> None:
    """Raise InstallError unless the file at ``path`` has the ``expected`` sha256."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"{path.name} has the sha256 {found}, not {expected}: it is not the release this tool "
            "knows, so nothing was installed."
        )


def mend(source: Path) -> None:
    """Mend the unpacked Detectron2 0.6 at ``source`` in place.

    Raises InstallError, naming the file, when one is missing or a pattern is not found in it;
    nothing is written then.
    """
    texts = {COMPILED_FILE: COMPILED_TEXT}
    for file, replacements in MENDS.items():
        if not (source / file).is_file():
            raise InstallError(f"{file} is missing in the source: it is not Detectron2 {VERSION}.")
        text = (source / file).read_text(encoding="utf-8")
        for pattern, new in replacements:
            text, found = re.subn(pattern, new, text, flags=re.MULTILINE)
            if not found:
                raise InstallError(
                    f"{file}: {pattern!r} is not found in it: it is not the file of Detectron2 "
                    f"{VERSION}, or is mended already."
                )
        texts[file] = text
    for file, text in texts.items():
        (source / file).write_text(text, encoding="utf-8")


def generator() -> str:
    """What the wheel says it was made by: this tool, and a fingerprint of what it puts in."""
    content = repr((MENDS, COMPILED_TEXT, REQUIRES, PACKAGES)).encode()
    return f"install_detectron2 ({hashlib.sha256(content).hexdigest()[:12]})"


def build_wheel(source: Path, folder: Path) -> Path:
    """Write the PACKAGES of the tree at ``source`` as a pure-Python wheel into ``folder``.

    Python files and the configs of the model zoo go in. Returns the wheel's path.
    """
    files = {
        f"{target}/{path.relative_to(source / package).as_posix()}": path.read_bytes()
        for package, target in PACKAGES.items()
        for path in sorted((source / package).rglob("*"))
        if path.suffix in (".py", ".yaml")
    }
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Detectron2, pure Python, mended for today's libraries",
        "License: Apache-2.0",
        "Requires-Python: >=3.9",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
    ]
    wheel = ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    wheel += [f"Generator: {generator()}"]
    info = f"detectron2-{VERSION}.dist-info"
    files[f"{info}/LICENSE"] = (source / "LICENSE").read_bytes()
    files[f"{info}/METADATA"] = "\n".join([*metadata, ""]).encode()
    files[f"{info}/WHEEL"] = "\n".join([*wheel, ""]).encode()
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()

    path = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def run(*command: str, first: Path | None = None) -> subprocess.CompletedProcess:
    """Run this Python with ``command``, the folder ``first`` leading its path; output as text."""
    path = os.pathsep.join(filter(None, [str(first or ""), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # Elsewhere than in the current folder, where a 'detectron2' folder would hide the installed.
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=sys.prefix, text=True, capture_output=True
    )


def check(process: subprocess.CompletedProcess, sentence: str) -> None:
    """Raise InstallError with ``sentence`` and the last error of ``process`` if that failed."""
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|error|\w*Error):", line)]
        raise InstallError(f"{sentence} ({(errors or lines or ['no message'])[-1]})")


def download(folder: Path) -> Path:
    """Fetch the source of the release into ``folder`` with pip; return the path of the archive."""
    tools, wanted = folder / "tools", folder / "wanted.txt"
    check(
        run("-m", "pip", "install", "--quiet", "--target", str(tools), *BUILD_TOOLS),
        f"{' '.join(BUILD_TOOLS)} could not be downloaded: is a package index reachable, and does "
        "this Python have pip (python -m ensurepip)?",
    )
    # Given the hash, pip checks the archive before it runs the setup.py inside.
    wanted.write_text(f"{PROJECT}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-build-isolation", "--no-binary", PROJECT, "--dest", str(folder)]
    check(
        run("-m", "pip", "download", "--quiet", *options, "-r", str(wanted), first=tools),
        f"{PROJECT} {VERSION} with the sha256 {SHA256} could not be downloaded from the package "
        "index, so nothing was installed.",
    )
    return next(folder.glob("*.tar.gz"))


def installed(module: str) -> bool:
    """Whether this Python finds ``module`` (an empty folder of that name does not count)."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def installed_generator() -> str:
    """The generator() that made the installed Detectron2, '' when it is not this tool's."""
    try:
        wheel = importlib.metadata.distribution("detectron2").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = re.search(r"^Generator: (install_detectron2 .*)$", wheel, re.MULTILINE)
    return found.group(1) if found else ""


def install(sdist: Path | None = None, wheel_dir: Path | None = None) -> str:
    """Install Detectron2 unless one works, or only write the wheel into ``wheel_dir``.

    ``sdist`` is the source archive where it need not be downloaded. Returns what was done, in one
    line; raises InstallError.
    """
    ours = installed_generator()
    # One that this tool made with other mends is not left alone, but replaced.
    if not wheel_dir and installed("detectron2") and ours in ("", generator()):
        process = run("-c", PROBE)
        if process.returncode == 0:
            return f"{process.stdout.splitlines()[-1]} works here already: left as it is."
        if not ours:
            check(
                process,
                "A Detectron2 is installed that cannot be imported: repair it, or run 'pip "
                f"uninstall detectron2' and this again, to have {VERSION} installed.",
            )
    if not installed("torch"):
        raise InstallError(
            "PyTorch is missing here: install torch and torchvision first (see requirements.txt)."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = sdist or download(folder)
        check_sha256(sdist)
        shutil.unpack_archive(sdist, folder)
        source = folder / f"{PROJECT}-{VERSION}"
        mend(source)
        if wheel_dir:
            wheel_dir.mkdir(parents=True, exist_ok=True)
            return f"{build_wheel(source, wheel_dir)} written."
        wheel = str(build_wheel(source, folder))
        options = ["--quiet", "--no-deps", "--no-index", "--force-reinstall"]
        check(run("-m", "pip", "install", *options, wheel), "pip could not install the wheel.")
    check(
        run("-c", PROBE),
        f"Detectron2 {VERSION} was installed but cannot be imported: is all of requirements.txt "
        "installed?",
    )
    return f"detectron2 {VERSION} installed (pure Python, mended)."


def main() -> int:
    """Installs Detectron2, or only writes its wheel; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help=f"{PROJECT}-{VERSION}.tar.gz, if at hand")
    parser.add_argument("--wheel-dir", type=Path, help="only write the wheel into this folder")
    arguments = parser.parse_args()
    try:
        print(install(arguments.sdist, arguments.wheel_dir))
    except (InstallError, OSError) as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
