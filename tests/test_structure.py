"""The house rules: who imports whom."""

import ast

import pytest
from helpers import ROOT

MODULES = sorted((ROOT / "msad_kd").rglob("*.py"))
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
