"""Paths that no file system takes are a line wherever they are given."""

import pytest

from fedqsn_jax import load
from fedqsn_jax.cli.main import main
from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError


@pytest.mark.parametrize("kind", ["long", "NUL", "loop", "nothing"])
def test_a_path_that_cannot_be_one_is_a_line(kind, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path, says = {
        "long": ("x" * 300, "x...: File name too long"),
        "NUL": ("a\0b", "'a\\x00b': that is no path (embedded null byte)"),
        "loop": (tmp_path / "loop", ": Too many levels of symbolic links"),
        "nothing": (None, "None: that is no path ("),
    }[kind]
    for read in (user_path, load):
        with pytest.raises(UserError) as error:
            read(path)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
    if path is not None:
        assert main(["--config=configs/digits.py", f"--workdir={path}"]) == 2
        assert says in capsys.readouterr().err


def test_a_directory_that_is_a_link_to_nothing_is_a_line(tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        assert main(["--config=configs/digits.py", f"--workdir={path}"]) == 2
        error = capsys.readouterr().err
        assert error.endswith(f"link is a link to {tmp_path / 'nothing'}, which does not exist\n")
        assert error.count("\n") == 1


def test_a_path_need_not_exist(tmp_path):
    assert user_path(tmp_path / "new" / "one") == tmp_path / "new" / "one"
    (tmp_path / "file").write_text("")
    assert user_path(tmp_path / "file" / "below") == tmp_path / "file" / "below"
