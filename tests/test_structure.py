"""The house rules: who imports whom, and who reads files that could run code."""

import ast

import pytest
from helpers import ROOT

MODULES = sorted((ROOT / "msad_kd").rglob("*.py"))
SCRIPTS = [ROOT / "train_net.py", *(ROOT / "tools").rglob("*.py")]
PROJECTS = sorted((ROOT / "projects").glob("*/*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def outside_functions(node):
    """Yield the nodes that are run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def imported(path, at_once=False):
    """The modules that a file imports: all, or those which it imports when it is imported."""
    modules, names = {name_of(module) for module in MODULES}, set()
    tree = ast.parse(path.read_text())
    for node in outside_functions(tree) if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in modules else node.module)
    return names


# Each room may import itself and the rooms of lower floors.
FLOORS = {
    "utils": 1,
    "losses": 2,
    "modeling": 2,
    "data": 3,
    "checkpoint": 3,
    "evaluation": 4,
    "config": 5,
    "distill": 6,
    "export": 6,
    "engine": 7,
    "ladder": 8,
}


def room_of(name):
    return name.split(".")[1] if name.startswith("msad_kd.") else None


def test_every_module_is_in_a_room():
    assert {path.name for path in (ROOT / "msad_kd").glob("*.py")} == {"__init__.py"}
    assert {room_of(name_of(path)) for path in MODULES} - {None} == FLOORS.keys()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downwards(path):
    room = room_of(name_of(path))
    if room is None:
        return
    for name in imported(path):
        other = room_of(name)
        assert name != "msad_kd", f"{path} imports the top of the library"
        assert other in (None, room) or FLOORS[other] < FLOORS[room], f"{path} imports {name}"


def test_there_are_modules():
    assert len(MODULES) > 10 and len(PROJECTS) > 10


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_library_knows_nothing_of_what_is_built_on_it(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"projects", "tools", "tests", "train_net", "helpers", "conftest"}


@pytest.mark.parametrize("path", PROJECTS, ids=lambda path: path.name)
def test_a_project_stands_by_itself(path):
    others = {name for name in imported(path) if name.split(".")[0] == "projects"}
    assert {name.split(".")[1] for name in others} <= {path.parent.name}


def test_only_a_config_with_a_timm_backbone_imports_timm():
    for path in MODULES:
        if path.name != "timm_backbone.py":
            names = imported(path, at_once=True)
            assert not any("timm" in name for name in names), f"{path} imports {names}"


def test_no_import_circle():
    graph = {name_of(path): imported(path) for path in MODULES}
    assert len(graph["msad_kd"] & graph.keys()) > 5
    done = set()

    def visit(name, path):
        assert name not in path, f"import circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in sorted(graph[name] & graph.keys()):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


# Module to those of its functions and classes that run the code in a file, such as a pickle's.
RUN_CODE = {
    "torch": {"load"},
    "pickle": {"load", "loads", "Unpickler", "_Unpickler"},
    "detectron2": {"DetectionCheckpointer"},
    "fvcore": {"Checkpointer"},
}
# Files to what they use of these.
ALLOWED = {
    # The one reader of pickles and of torch's files; it runs code only with --trust-files.
    "msad_kd/utils/unpickle.py": {"pickle.load", "pickle._Unpickler", "torch.load"},
    # The base class of SafeCheckpointer, which reads files by the reader above.
    "msad_kd/checkpoint/checkpoint.py": {"detectron2.checkpoint.DetectionCheckpointer"},
    # It loads the TorchScript that it has just written.
    "tools/export_model.py": {"torch.jit.load"},
    # They copy objects in memory, and read no file.
    "tools/analysis/benchmark_evaluation.py": {"pickle.loads"},
    "projects/study/configs.py": {"pickle.loads"},
}


def running_code(tree):
    """The names in a module, by their origin, of what runs the code in a file."""
    origins, found = {}, set()
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                origins[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            origins |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            parts = [*origins.get(first, "").split("."), *rest]
            if parts[-1] in RUN_CODE.get(parts[0], ()):
                found.add(".".join(parts))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.add("allow_pickle")
    return found


def test_only_these_files_use_what_runs_the_code_in_a_file():
    found = {}
    for path in [*MODULES, *SCRIPTS, *(ROOT / "projects").rglob("*.py")]:
        if names := running_code(ast.parse(path.read_text())):
            found[str(path.relative_to(ROOT))] = names
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(file, weights_only=False)",
        "from torch import load as read\nread(file)",
        "import pickle as p\np.loads(content)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "from detectron2.checkpoint import DetectionCheckpointer\nDetectionCheckpointer(model)",
        "import fvcore.common.checkpoint\nfvcore.common.checkpoint.Checkpointer(model)",
    ],
)
def test_each_way_to_run_the_code_in_a_file_is_found(code):
    assert len(running_code(ast.parse(code))) == 1
