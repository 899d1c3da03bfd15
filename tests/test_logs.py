"""What the libraries say reaches the person: warnings always, the rest when asked for."""

import logging

import pytest

from kava_jax.cli.logs import show_logs
from tests.tiny import kava


@pytest.fixture(autouse=True)
def as_before():
    yield
    show_logs(verbose=False)


def said(capsys) -> list[str]:
    """What is heard of a word at every level from JAX, Orbax (absl) and another library."""
    capsys.readouterr()
    for name in ("jax._src.compiler", "absl", "orbax.checkpoint"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "%s speaks", logging.getLevelName(level).lower())
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_warnings_and_errors_are_shown_once_with_their_source(capsys):
    show_logs(verbose=False)
    show_logs(verbose=False)
    assert said(capsys) == [
        f"{level.upper()} {name}: {level} speaks"
        for name in ("jax._src.compiler", "absl", "orbax.checkpoint")
        for level in ("warning", "error")
    ]


def test_verbose_shows_more(capsys):
    show_logs(verbose=True)
    found = said(capsys)
    assert len(found) == 9
    assert all(line.split(" ", 1)[1].split()[0] in ("INFO", "WARNING", "ERROR") for line in found)


def test_what_is_meant_so_or_raised_as_well_is_left_out(capsys):
    show_logs(verbose=False)
    absl = logging.getLogger("absl")
    absl.warning("Given directory is read only=%s", "run/checkpoints")
    try:
        raise OSError("No space left on device")
    except OSError:
        absl.exception("Failed to run 3 Handler Commit operations")
    assert capsys.readouterr().err == ""
    show_logs(verbose=True)
    absl.warning("Given directory is read only=%s", "run/checkpoints")
    assert "read only=run/checkpoints" in capsys.readouterr().err


def test_the_flag_stands_before_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert kava(capsys, "--verbose", "verify").code == 0
    assert logging.getLogger().level == logging.INFO
    assert kava(capsys, "verify").code == 0
    assert logging.getLogger().level == logging.WARNING
