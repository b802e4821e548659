"""Who may import whom: folders stand in an order, and secrets stay on the server's side."""

import ast
import functools
import re
from pathlib import Path

import pytest
from locations import PACKAGE, ROOT

# Lowest first. A file imports from its own folder and from those on lines above; folders on one
# line stand side by side and never import each other.
FOLDERS = (
    ("core",),
    ("config",),
    ("host",),
    ("reporting",),
    ("protocol",),
    ("data",),
    ("models",),
    ("rounds",),
    ("generation",),
    ("prompting",),
    ("problems",),
    ("simulation",),
    ("runs",),
    ("api", "sweeps", "benchmarks", "audit", "deploy"),
    ("cli", "tools"),
)
LEVEL = {name: level for level, names in enumerate(FOLDERS) for name in names}
TOP = {"__init__", "__main__", "main", "sweep", "benchmark", "export"}
"""Modules beside the folders: the public names, and the commands' shims."""

PURE = ("core", "protocol", "rounds", "prompting", "models.kernels")
"""What can be read, tested and reused alone."""
OUTER = ("config", "host", "reporting")

# What a client's process runs: it must work without anything that knows the server's state.
CLIENT_SIDE = (
    "rounds.client",
    "protocol.layout",
    "protocol.wire",
    "deploy.client",
    "deploy.client_app",
    "deploy.client_files",
    "deploy.client_model",
    "deploy.kept",
    "deploy.texts",
    "deploy.work",
    "deploy.worker",
)
SERVER_SIDE = (
    "host.checkpoints",
    "protocol.algorithms",
    "rounds.aggregation",
    "rounds.federation",
    "rounds.views",
    "generation.text_views",
    "simulation",
    "runs",
    "deploy.asking",
    "deploy.flower_network",
    "deploy.registry",
    "deploy.server",
    "deploy.server_app",
    "deploy.server_files",
    "deploy.server_model",
    "deploy.session",
)


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name in it; a folder's own is the folder's name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


@functools.cache
def imports(name: str) -> frozenset[str]:
    """The modules of the package that a module imports anywhere, also inside its functions.

    What stands under TYPE_CHECKING counts too, as a reader follows it all the same.
    """
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        targets = []
        if isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        for target in targets:
            if target.startswith("fedqsn_jax."):
                parts = target.removeprefix("fedqsn_jax.").split(".")
                while parts and ".".join(parts) not in modules():
                    parts.pop()
                assert parts, target
                found.add(".".join(parts))
    return frozenset(found)


def reached(start: str) -> set[str]:
    """Everything that importing a module may come to import, itself among it."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        # Importing a module runs the `__init__` of every folder it lies in.
        parts = name.split(".")
        todo += [".".join(parts[:depth]) for depth in range(1, len(parts))]
        todo += imports(name)
    return seen


def folder(name: str) -> str:
    return name.split(".")[0]


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_every_folder_has_its_place_and_its_purpose():
    assert {folder(name) for name in modules() if name != "__init__"} == set(LEVEL) | TOP - {
        "__init__"
    }
    for file in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file


def test_a_file_imports_from_folders_before_its_own():
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if folder(name) in LEVEL
        for other in imports(name)
        if folder(other) != folder(name)
        and LEVEL.get(folder(other), len(FOLDERS)) >= LEVEL[folder(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycles():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in imports(name):
            visit(other)
        done.add(path.pop())

    for name in modules():
        visit(name)


@pytest.mark.parametrize("place", PURE)
def test_the_pure_core_knows_nothing_of_machines_and_configurations(place):
    wrong = {
        f"{name} reaches {other}"
        for name in modules()
        if within(name, (place,))
        for other in reached(name)
        if within(other, OUTER)
    }
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("name", CLIENT_SIDE)
def test_what_clients_run_knows_nothing_of_the_server(name):
    wrong = {other for other in reached(name) if within(other, SERVER_SIDE)}
    assert not wrong


def test_no_test_needs_another_folders_tests():
    """So that a file, or a folder, runs alone."""
    files = list((ROOT / "tests").rglob("*.py"))
    homes = {file.stem: file.parent for file in files}
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.MULTILINE)
        if name in homes and homes[name] not in (file.parent, ROOT / "tests")
    ]
    assert not wrong, "\n".join(wrong)
