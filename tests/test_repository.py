"""What stands outside the package keeps its promises: README, Makefile, CI, pins, configs."""

import os
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kava_jax.config.file import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PYTHONS = ("3.11", "3.12")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(lines, python: str) -> dict[str, Requirement]:
    """By normalised name, those whose marker holds for a Python version."""
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        re.sub("[-_.]+", "-", item.name).lower(): item
        for item in parsed
        if item.marker is None or item.marker.evaluate({"python_version": python})
    }


def test_every_make_command_in_the_readme_is_a_target():
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), flags=re.M))
    assert {"demo", "test", "lint"} <= targets
    named = set(re.findall(r"(?:^\s*|`)make ([a-z][\w-]*)", read("README.md"), flags=re.M))
    assert named <= targets


def test_ci_runs_the_test_command():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    """All tests with one Python, and the README's own command with the other."""
    script = read(".ci/run")
    assert "\nmake test-all\n" in script
    assert "make test PYTHON=" in script


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_bounds(python):
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["gcs"], *extras["test"]]
    wanted.remove("kava-jax[gcs]")  # the tests' own way to name that extra
    pins = requirements(read("constraints.txt").splitlines(), python)
    for name, requirement in requirements(wanted, python).items():
        assert name in pins, f"{name} is not in constraints.txt for Python {python}"
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert pin.version in requirement.specifier, f"{pins[name]} is not {requirement}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    load_config(path)
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header, "a config opens with a comment: command, hardware, time, result"
    assert re.search(rf"kava (train configs/{re.escape(path.name)}|demo)", header[0])
