#!/usr/bin/env python3
"""Install Detectron2 0.6, mended for today's libraries, into the Python that runs this file.

    python tools/install_detectron2.py

A Detectron2 that works is left alone, whatever its version. Otherwise pip downloads the source of
release 0.6 from the package index (published as ``pb1-detectron2``). Its SHA-256 is checked, the
mends below are applied (each follows a later change of the Detectron2 project), and the result is
installed as a pure-Python wheel. The wheel has no compiled operators. Boxes, masks and keypoints
need none; what does need one, such as rotated boxes, raises an ImportError when it is called.
"""

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

# What it takes to read the source, whatever is installed: pip 26.3 refuses its metadata, and its
# setup.py needs setuptools.
BUILD_TOOLS = ["pip==25.3", "setuptools<82", "wheel"]

REQUIRES = """torch torchvision numpy Pillow>=7.1 matplotlib pycocotools>=2.0.2 termcolor>=1.1
yacs>=0.1.8 tabulate cloudpickle tqdm>4.29.0 tensorboard fvcore>=0.1.5,<0.1.6 iopath>=0.1.7
omegaconf>=2.1 hydra-core>=1.1""".split()

# Folders of the source and their place in the wheel.
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

# A file that is added to the wheel: what operators call instead of compiled code.
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
NUMPY_FILES = """data/build data/datasets/pascal_voc evaluation/pascal_voc_evaluation
evaluation/sem_seg_evaluation structures/masks utils/video_visualizer utils/visualizer""".split()
OPTIONAL_C = (r"^from detectron2 import _C$", "from detectron2.layers.compiled import _C")

# File of the source: (pattern, replacement) pairs.
MENDS = {
    **{f"detectron2/{file}.py": [NUMPY] for file in NUMPY_FILES},
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
    # torch 2 has no caffe2, so the parts of detectron2.export that need it are left out.
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
    # torch 2 warns about these, at the start or at every step.
    "detectron2/modeling/anchor_generator.py": [
        (r"meshgrid\(shifts_y, shifts_x\)", 'meshgrid(shifts_y, shifts_x, indexing="ij")'),
    ],
    "detectron2/engine/train_loop.py": [
        (r"torch\.cuda\.amp import", "torch.amp import"),
        (r"\b(GradScaler|autocast)\(\)", r'\1("cuda")'),
    ],
}


class InstallError(Exception):
    """A failed installation; the message says what to do."""


def check_sha256(path: Path, expected: str = SHA256) -> None:
    """Raise an InstallError unless the file has the expected SHA-256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise InstallError(
            f"{path.name} has the sha256 {digest}, not {expected}: it is another release than this "
            "tool expects, so nothing was installed."
        )


def mend(source: Path) -> None:
    """Mend the unpacked Detectron2 0.6 at ``source`` in place, completely or not at all.

    Raises:
        InstallError: if a file is missing, or a pattern is not found in it.
    """
    texts = {COMPILED_FILE: COMPILED_TEXT}
    for file, replacements in MENDS.items():
        if not (source / file).is_file():
            raise InstallError(f"{file} is missing: the source is not Detectron2 {VERSION}.")
        text = (source / file).read_text(encoding="utf-8")
        for pattern, new in replacements:
            text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
            if not count:
                raise InstallError(
                    f"{file}: {pattern!r} is not found in it: the source is not Detectron2 "
                    f"{VERSION}, or is mended already."
                )
        texts[file] = text
    for file, text in texts.items():
        (source / file).write_text(text, encoding="utf-8")


def generator() -> str:
    """Return the wheel's "Generator": this tool and a fingerprint of what it changes."""
    content = repr((MENDS, COMPILED_TEXT, REQUIRES, PACKAGES)).encode()
    return f"install_detectron2 ({hashlib.sha256(content).hexdigest()[:12]})"


def build_wheel(source: Path, folder: Path) -> Path:
    """Write the Python files and YAML configs of ``source`` as a wheel to ``folder``.

    Returns:
        The path of the wheel.
    """
    files = {
        f"{target}/{path.relative_to(source / package).as_posix()}": path.read_bytes()
        for package, target in PACKAGES.items()
        for path in sorted((source / package).rglob("*"))
        if path.suffix in (".py", ".yaml")
    }
    metadata = f"""Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2, pure Python, mended for today's libraries
License: Apache-2.0
Requires-Python: >=3.9
"""
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIRES)
    wheel = f"Wheel-Version: 1.0\nGenerator: {generator()}\n"
    wheel += "Root-Is-Purelib: true\nTag: py3-none-any\n"
    info = f"detectron2-{VERSION}.dist-info"
    files[f"{info}/LICENSE"] = (source / "LICENSE").read_bytes()
    files[f"{info}/METADATA"], files[f"{info}/WHEEL"] = metadata.encode(), wheel.encode()
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
    """Run this Python with a command and capture its output; ``first`` leads its path."""
    path = os.pathsep.join(filter(None, [str(first or ""), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # Not in the current folder, where a folder called 'detectron2' would hide the installed one.
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=sys.prefix, text=True, capture_output=True
    )


def check(process: subprocess.CompletedProcess, sentence: str) -> None:
    """Raise an InstallError of ``sentence`` and the last error message if ``process`` failed."""
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|error|\w*Error):", line)]
        raise InstallError(f"{sentence} ({(errors or lines or ['no message'])[-1]})")


def download(folder: Path) -> Path:
    """Download the source of the release to ``folder`` with pip; return the archive's path."""
    tools, requirements = folder / "tools", folder / "requirements.txt"
    check(
        run("-m", "pip", "install", "--quiet", "--target", str(tools), *BUILD_TOOLS),
        f"{' '.join(BUILD_TOOLS)} could not be downloaded: is a package index reachable, and does "
        "this Python have pip (python -m ensurepip)?",
    )
    # With the hash, pip checks the archive before it runs the setup.py in it.
    requirements.write_text(f"{PROJECT}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-build-isolation", "--no-binary", PROJECT, "--dest", str(folder)]
    check(
        run("-m", "pip", "download", "--quiet", *options, "-r", str(requirements), first=tools),
        f"{PROJECT} {VERSION} with the sha256 {SHA256} could not be downloaded from the package "
        "index, so nothing was installed.",
    )
    return next(folder.glob("*.tar.gz"))


def installed(module: str) -> bool:
    """Return whether this Python finds a module; an empty folder of that name does not count."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def installed_generator() -> str:
    """Return the generator() of the installed Detectron2, or "" if it is not from this tool."""
    try:
        wheel = importlib.metadata.distribution("detectron2").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
    match = re.search(r"^Generator: (install_detectron2 .*)$", wheel, re.MULTILINE)
    return match[1] if match else ""


def install(sdist: Path | None = None, wheel_dir: Path | None = None) -> str:
    """Install Detectron2 unless one works here.

    Args:
        sdist: the source archive; it is downloaded if None.
        wheel_dir: only write the wheel to this folder.

    Returns:
        One line that says what was done.

    Raises:
        InstallError: if it cannot be installed.
    """
    ours = installed_generator()
    # A working one is left alone, unless this tool made it with other mends.
    if not wheel_dir and installed("detectron2") and ours in ("", generator()):
        process = run("-c", PROBE)
        if process.returncode == 0:
            return f"{process.stdout.splitlines()[-1]} works here already: left as it is."
        if not ours:
            check(
                process,
                "The installed Detectron2 cannot be imported: repair it, or run 'pip uninstall "
                f"detectron2' and then this tool to install {VERSION}.",
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
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help=f"a local {PROJECT}-{VERSION}.tar.gz")
    parser.add_argument("--wheel-dir", type=Path, help="only write the wheel to this folder")
    arguments = parser.parse_args()
    try:
        print(install(arguments.sdist, arguments.wheel_dir))
    except (InstallError, OSError) as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
