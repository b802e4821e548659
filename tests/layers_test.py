"""Who may import whom: arrows point down, and secrets stay on the server's side."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fedqsn_jax"

# Lowest first; a module may import those on lines above its own, and its own folder's.
FLOORS = (
    ("types", "patterns", "schedule", "ending"),
    ("randomness", "config", "placement"),
    ("lifeline", "device_time", "failed_reads", "variants"),
    ("tasks", "quantization", "checkpoint", "reporting", "command_line", "processes"),
    ("client_optimizer", "generation", "masking", "text_scores"),
    ("lora", "trainable"),
    ("low_rank",),
    ("memory",),
    ("metrics", "models", "data", "language_tasks"),
    ("client_metrics", "cohort", "heads", "participation", "proxy", "text_evaluation"),
    ("layout",),
    ("client", "aggregation", "upload", "views", "wire", "parallelism"),
    ("rounds", "traffic", "text_views", "fedsp"),
    ("algorithms",),
    ("configured",),
    ("pretraining", "round_memory", "unused"),
    ("cautions",),
    ("simulation",),
    ("running", "costs", "workdir", "workloads", "problem", "own_rows"),
    ("prompted_problem", "written_texts"),
    ("image_problem", "language_problem"),
    ("experiment", "own_model", "measuring", "export", "trained"),
    ("sweeps",),
    ("main", "sweep", "benchmark", "__init__", "__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# What a client's process runs: it must work without anything that knows the server's state.
CLIENT_SIDE = ("client", "layout", "wire")
SERVER_STATE = (
    "rounds",
    "aggregation",
    "views",
    "text_views",
    "algorithms",
    "round_memory",
    "simulation",
    "running",
    "experiment",
)


def imports(file: Path) -> set[str]:
    """The first part, after the package's name, of every import inside the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("fedqsn_jax.")}
    return found


def unit(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_arrows_point_down():
    files = [file for file in PACKAGE.rglob("*.py") if "configs" not in file.parts]
    assert {unit(file) for file in files} == set(FLOOR)
    wrong = [
        f"{unit(file)} imports {other}"
        for file in files
        for other in imports(file)
        if other != unit(file) and FLOOR[other] >= FLOOR[unit(file)]
    ]
    assert not wrong


def test_what_clients_run_knows_nothing_of_the_server():
    reached, todo = set(), list(CLIENT_SIDE)
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        module = PACKAGE / f"{name}.py"
        files = [module] if module.exists() else list((PACKAGE / name).glob("*.py"))
        todo += [other for file in files for other in imports(file)]
    assert reached.isdisjoint(SERVER_STATE)
