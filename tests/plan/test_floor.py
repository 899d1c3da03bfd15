"""FLOPs of the whole step, loops multiplied in, against the fewest that it can do."""

from pathlib import Path

import jax
import pytest

from kava_jax.bench.pairs import Pair
from kava_jax.config.file import parse_config
from kava_jax.hf.config_json import spec_from_config
from kava_jax.parallel.mesh import make_mesh
from kava_jax.plan.compiled import compile_step
from kava_jax.plan.floor import step_floor
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.find_models import Found, Models
from tests.tiny import CONFIG

PAIR = Pair()


def blueprint(*overrides: str) -> Blueprint:
    """The bench pair without weights: eight teacher layers over four student layers."""
    raw = {"recipe": "original", **CONFIG, "data": {"path": "builtin:word_problems"}}
    config = parse_config(raw, ["data.batch_size=4", "mesh.data=1", *overrides])
    teacher, student = (
        spec_from_config(model, where="bench") for model in (PAIR.teacher, PAIR.student)
    )
    somewhere = Path("nowhere")
    models = Models(Found(somewhere, student), {"big": Found(somewhere, teacher)})
    return make_blueprint(config, make_mesh(1, 1, 1, jax.devices()[:1]), models, {})


def flops(made: Blueprint) -> float:
    return compile_step(made, PAIR.rows, PAIR.length)[0].flops


def floor(made: Blueprint):
    return step_floor(made, PAIR.rows, PAIR.length, PAIR.rows * (PAIR.length - 1))


def test_the_step_does_at_most_a_tenth_more_than_it_must() -> None:
    made = blueprint()
    assert 1.0 <= flops(made) / sum(floor(made).values()) <= 1.10


@pytest.mark.parametrize("reader", ["teacher", "student"])
def test_a_handoff_costs_its_projector_and_the_answering_teacher(reader) -> None:
    made = blueprint(f"loss.handoff={{reader: {reader}}}")
    assert 1.0 <= flops(made) / sum(floor(made).values()) <= 1.10
    assert floor(made)["projector"] > floor(blueprint())["projector"]


def test_a_projector_without_weights_costs_nothing() -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    spec = spec_from_config(PAIR.student | heads, where="bench")
    config = parse_config({**CONFIG, "projector": {"kind": "identity"}}, ["data.batch_size=8"])
    models = Models(Found(Path(), spec), {"big": Found(Path(), spec)})
    made = make_blueprint(config, make_mesh(1, 1, 1, jax.devices()[:1]), models, {})
    found = floor(made)
    assert found["projector"] == 0
    assert min(found["teachers"], found["student"], found["heads"]) > 0


def test_a_teacher_of_which_half_is_mapped_costs_half() -> None:
    """What is saved is what the formula says: four layers and the last one's attention and MLP."""
    half = "teachers.0.layer_map=[[0, 0], [1, 1], [2, 2], [3, 3]]"
    whole, cut = blueprint(), blueprint(half)
    assert cut.teachers["big"].blocks == 3
    saved = floor(whole)["teachers"] - floor(cut)["teachers"]
    assert floor(cut)["teachers"] / floor(whole)["teachers"] == pytest.approx(3 / 7, rel=0.05)
    # Attention runs over the whole square, of which the formula counts the causal half.
    assert flops(whole) - flops(cut) == pytest.approx(saved, rel=0.06)
