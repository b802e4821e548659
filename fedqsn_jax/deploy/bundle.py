"""The application that Flower hands to every party: two programs' names, and nothing else.

Flower sends the bundle to all clients. So it holds no weights, no settings and none of our code:
each party imports what it runs from the package that it has installed.
"""

from pathlib import Path

NAME = "fedqsn-app"

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "Names the programs of fedqsn_jax."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.42,<1.43"]

[tool.hatch.build.targets.wheel]
packages = ["fedqsn_app"]

[tool.flwr.app]
publisher = "fedqsn"
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "fedqsn_app.server:app"
clientapp = "fedqsn_app.client:app"

[tool.flwr.app.config]
"""

_FILES = {
    "LICENSE": "Apache-2.0\n",
    "fedqsn_app/__init__.py": "",
    "fedqsn_app/client.py": "from fedqsn_jax.deploy.client_app import app\n\n__all__ = ['app']\n",
    "fedqsn_app/server.py": "from fedqsn_jax.deploy.server_app import app\n\n__all__ = ['app']\n",
}


def write_bundle(directory: Path) -> Path:
    """Writes the application into a directory of its own there, and returns that."""
    place = directory / NAME
    for name, content in {**_FILES, "pyproject.toml": _PROJECT.format(name=NAME)}.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return place
