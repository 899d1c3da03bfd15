"""Most plans here are of one run on one mesh: each program is compiled once for the whole file."""

from collections.abc import Callable
from typing import Any

import pytest

from kava_jax.config.file import dump_config
from kava_jax.plan import planning
from kava_jax.runs.blueprint import Blueprint


def _once(compile_: Callable) -> Callable:
    """The same answers from memory, by everything that the program is made from."""
    known: dict[str, Any] = {}

    def answer(blueprint: Blueprint, rows: int, length: int) -> Any:
        specs = [blueprint.student_spec, *(part.spec for part in blueprint.teachers.values())]
        config = dump_config(blueprint.config) | {"run": {}}
        key = repr((config, specs, blueprint.mesh.shape_tuple, rows, length))
        if key not in known:
            known[key] = compile_(blueprint, rows, length)
        return known[key]

    return answer


_STEP = _once(planning.compile_step)


@pytest.fixture(autouse=True)
def _each_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "compile_step", _STEP)
