"""The documents are true: links lead somewhere, commands exist, and code runs as it is printed."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from locations import PACKAGE, ROOT

from fedqsn_jax.cli.main import main
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.fields import describe
from fedqsn_jax.config.schema import Config

DOCUMENTS = [
    Path("README.md"),
    *sorted(
        path.relative_to(ROOT)
        for folder in ("fedqsn_jax", "configs", "tests", "notebooks")
        for path in (ROOT / folder).rglob("*.md")
    ),
]
README = (ROOT / "README.md").read_text()


def text_of(document: Path) -> str:
    return (ROOT / document).read_text()


def fenced(text: str) -> list[tuple[str, str]]:
    """The blocks of a document: language and body."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return [body for named, body in fenced(text) if named == language]


def anchors(text: str) -> set[str]:
    """Names that are made of headings: small letters, hyphens for spaces, nothing else."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", each.lower()).replace(" ", "-") for each in headings}


def commands(text: str) -> list[list[str]]:
    """Every ``python -m fedqsn_jax.NAME ...`` that stands in a block, its words."""
    found = []
    for block in (body for named, body in fenced(text) if named != "python"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.partition("  #")[0].split("&&"):
                words = shlex.split(part)
                if words[:2] == ["python", "-m"] and words[2].startswith("fedqsn_jax."):
                    found.append(words[2:])
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    for target, _, anchor in (
        link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text_of(document))
    ):
        if target.startswith("http"):
            continue
        place = (ROOT / document).parent / target if target else ROOT / document
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place.read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_commands_name_what_exists(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, *words in commands(text_of(document)):
        assert importlib.util.find_spec(name), name
        options = dict(word[2:].split("=", 1) for word in words if re.match(r"--\w+=", word))
        if "config" in options and "DIRECTORY" not in options["config"]:
            overrides = [word for word in words if word.startswith("--config.")]
            read_config(options["config"], overrides)
        if "sweep" in options:
            assert Path(options["sweep"]).exists()


def test_python_blocks_parse():
    for document in DOCUMENTS:
        for block in blocks(text_of(document), "python"):
            compile(block, str(document), "exec")


def test_what_python_blocks_import_exists():
    for document in DOCUMENTS:
        for block in blocks(text_of(document), "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("fedqsn_jax"):
                    module = importlib.import_module(node.module)
                    missing = [each.name for each in node.names if not hasattr(module, each.name)]
                    assert not missing, f"{document}: {node.module} has no {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_that_are_named_exist(document):
    here = (ROOT / document).parent
    for name in re.findall(r"`([\w/]+\.py)`", text_of(document)):
        if "NAME" not in name:
            found = [*ROOT.glob(name), *PACKAGE.glob(name), *here.glob(name), *here.rglob(name)]
            in_package = list(PACKAGE.rglob(name)) if "/" not in name else []
            assert found or in_package or (ROOT / "tests" / name).exists(), name


def test_what_docstrings_refer_to_exists():
    """A reference ``module.name`` between single backticks, to a file of the package."""
    sources = {file: file.read_text() for file in PACKAGE.rglob("*.py")}
    classes = set(re.findall(r"^class (\w+)", "\n".join(sources.values()), re.MULTILINE))
    words = {file: set(re.findall(r"\w+", text)) for file, text in sources.items()}
    elsewhere = {"fedqsn_jax", "jax", "optax"}

    def exists(reference: str) -> bool:
        first, *_ = path = reference.split(".")
        if first in elsewhere | classes or reference in describe(Config):
            return True
        if PACKAGE.joinpath(*path).is_dir():
            return True
        place, last = "/".join(path[:-1]), path[-1]
        files = [file for file in sources if f"/{file.with_suffix('')}".endswith(f"/{place}")]
        inside = [file for file in sources if str(file.parent).endswith(f"/{place}")]
        return any(last in words[file] for file in files) or any(
            last in (file.stem, *words[file]) for file in inside if file.stem in (last, "__init__")
        )

    wrong = [
        f"{file.relative_to(ROOT)}: {reference}"
        for file, text in sources.items()
        for reference in re.findall(r"(?<!`)`([A-Za-z_]\w*(?:\.\w+)+)`(?!`)", text)
        if not exists(reference)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "document",
    [
        document
        for document in DOCUMENTS
        # These read what a run has left, and have a test of their own below, or elsewhere.
        if "fedqsn_jax.load(" not in text_of(document) and blocks(text_of(document), "python")
    ],
    ids=str,
)
def test_python_runs_as_it_is_printed(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "document"}
    for block in blocks(text_of(document), "python"):
        exec(compile(block, str(document), "exec"), names)


@pytest.mark.usefixtures("quick_compilation")
def test_the_example_of_an_own_model(capsys):
    example = next(block for block in blocks(README, "python") if "federate(" in block)
    assert len(example.strip().splitlines()) <= 22
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    shown = capsys.readouterr().out
    for view in ("global", "proxy", "attacker_1"):
        accuracy = float(re.search(rf"{view}'?:? +([0-9.]+)", shown).group(1))
        # The example's classes are separable: every view is far above chance, a third.
        assert accuracy > 0.6


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_is_read_as_it_is_printed(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    short = ["--config.rounds=1", "--config.client.steps=1", "--config.pretraining.steps=1"]
    monkeypatch.chdir(tmp_path)
    assert main([f"--config={ROOT}/configs/digits.py", *short, "--workdir=runs/digits"]) == 0
    (reading,) = blocks(text_of(Path("fedqsn_jax/runs/README.md")), "python")
    names = {"images": load_digits().data[:5].astype("float32") / 16}
    exec(compile(reading, "README.md", "exec"), names)
    assert names["logits"].shape == (5, 10)
    assert names["trained"].config.p1 == 0.2


def test_the_readme_is_short_and_has_the_two_commands():
    assert len(README.splitlines()) <= 200
    first, second = blocks(README, "bash")[:2]
    assert first.startswith("pip install . && python -m fedqsn_jax.main --config=configs/digits.py")
    assert second.startswith("pip install '.[test]' && pytest")
    assert first.count("\n") == second.count("\n") == 1


def test_every_folder_is_on_the_map():
    folders = {path.parent.name for path in (ROOT / "fedqsn_jax").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"`(\w+)/`", README))


def test_every_test_that_an_invariant_names_exists():
    text = text_of(Path("fedqsn_jax/protocol/README.md"))
    named = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(named) >= 9
    assert all((ROOT / name).exists() for name in named)


def test_no_row_of_figures_stands_twice():
    rows = [
        line
        for document in DOCUMENTS
        for line in text_of(document).splitlines()
        if line.startswith("|") and len(re.findall(r"\d+\.\d+|\.\d+", line)) >= 2
    ]
    assert sorted(rows) == sorted(set(rows))
