"""The numbers behind the pictures of docs/concept.md, computed by kava_jax's own functions.

Toys in a few dimensions, with seeds: they show what a formula does. Nothing here is the result of
training a language model; those are in docs/results/. Drawing is ``concept.py``'s.
"""

from functools import cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.diagnostics import alignment, diagnose, sample_tokens
from kava_jax.geometry import geodesic_rotate, magnitude, unit
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.known import KNOWN_CONFIGS
from kava_jax.losses import mercator, mercator_values, mse_values
from kava_jax.models.rope import rope_rotations, rotate_layers

TARGET = np.array([1.2, 0.9], np.float32)


class Surface(NamedTuple):
    """A loss over a square of student vectors around ``TARGET``: axis, [y, x], [y, x, 2]."""

    axis: np.ndarray
    values: np.ndarray
    downhill: np.ndarray


def surface(loss: Literal["mse", "mercator"], beta: float = 0.0, reach: float = 2.4) -> Surface:
    """The loss and its negative gradient at 205 x 205 points."""
    axis = np.linspace(-reach, reach, 205, dtype=np.float32)
    students = jnp.stack(jnp.meshgrid(axis, axis), axis=-1)
    targets = jnp.broadcast_to(TARGET, students.shape)

    @jax.jit
    def both(s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        def total(s: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = mse_values(s, t) if loss == "mse" else mercator_values(s, t, beta=beta)
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(s)
        return values, -gradient

    return Surface(axis, *(np.asarray(x) for x in both(students, targets)))


class ByAngle(NamedTuple):
    """Losses of a student turned away from its target; one row per length ratio."""

    degrees: np.ndarray
    mse: np.ndarray
    mercator: np.ndarray


def by_angle(ratios: tuple[float, ...]) -> ByAngle:
    """A target of length 1 in the plane, and students turned by 0 to 180 degrees."""
    degrees = np.linspace(0.0, 180.0, 91, dtype=np.float32)
    targets = jnp.tile(jnp.array([1.0, 0.0]), (len(degrees), 1))
    across = jnp.tile(jnp.array([0.0, 1.0]), (len(degrees), 1))
    turned = geodesic_rotate(targets, across, jnp.radians(degrees))
    students = [ratio * turned for ratio in ratios]
    return ByAngle(
        degrees,
        np.stack([mse_values(s, targets) for s in students]),
        np.stack([mercator_values(s, targets) for s in students]),
    )


def by_ratio(ratios: np.ndarray, betas: tuple[float, ...]) -> np.ndarray:
    """The magnitude term alone, [beta, ratio]: same direction, other length."""
    targets = jnp.tile(jnp.array([1.0, 0.0]), (len(ratios), 1))
    students = targets * jnp.asarray(ratios, jnp.float32)[:, None]
    return np.stack([mercator_values(students, targets, beta=beta) for beta in betas])


class Paths(NamedTuple):
    """Students under gradient descent: unit vectors [step, point, 3], their lengths, targets."""

    directions: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray


def paths(starts: np.ndarray, targets: np.ndarray, steps: int = 400) -> Paths:
    """Every student walks down its own ``1 - cos`` by plain gradient descent of rate 0.03."""
    t = jnp.asarray(targets, jnp.float32)

    def step(s: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return s - 0.03 * jax.grad(lambda x: mercator_values(x, t).sum())(s), s

    _, walked = jax.jit(lambda s: jax.lax.scan(step, s, None, steps))(jnp.asarray(starts))
    return Paths(*(np.asarray(x) for x in (unit(walked), magnitude(walked), unit(t))))


class Offsets(NamedTuple):
    """Cosines of *unrelated* keys that share an offset, one figure per offset / content ratio."""

    unrelated: np.ndarray
    constant: np.ndarray
    centred: np.ndarray


def offsets(ratios: np.ndarray, width: int = 128) -> Offsets:
    """Both sides: one shared offset and content of their own, drawn apart.

    Each ratio is a layer of its own: [P, B, T, K, H] with 8 x 64 tokens and one head.
    """
    rng = np.random.default_rng(0)
    student, target = rng.standard_normal((2, 1, 8, 64, 1, width), np.float32)
    direction = rng.standard_normal(width)
    offset = np.sqrt(width) * direction / np.linalg.norm(direction)
    shift = (np.asarray(ratios)[:, None] * offset)[:, None, None, None].astype(np.float32)
    s, t = jnp.asarray(student + shift), jnp.asarray(target + shift)
    mask = jnp.ones((8, 64), bool)

    @jax.jit
    def figures(s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = diagnose(sample_tokens(s, t, mask, 512))
        return alignment(s, t, mask)["cos"].value, found["cos_constant"], found["cos_centered"]

    return Offsets(*(np.asarray(x) for x in figures(s, t)))


class Course(NamedTuple):
    """Cosine and shuffled cosine at every step."""

    cos: np.ndarray
    cos_shuffled: np.ndarray


@cache
def joint_training(
    direction: Literal["teacher_to_student", "student_to_teacher"], steps: int = 200
) -> Course:
    """A student and a projector learn together to match a teacher that is pure noise.

    The student is an affine map of its own noise, drawn anew at every step like the teacher's: no
    token's target can be told from what the student sees, so an honest cosine stays at 0.
    """
    width, shape = 16, (1, 4, 16, 1, 16)
    projector = KVDimensionProjector(
        {"noise": {"d_model": width}}, width, dropout=0.0, direction=direction, rngs=nnx.Rngs(0)
    )
    graph, weights = nnx.split(projector)
    student = {"kernel": 0.3 * jax.random.normal(jax.random.key(1), (width, width))}
    params = {"student": student | {"bias": jnp.zeros(width)}, "projector": weights}
    optimizer = optax.adam(1e-2)
    mask = jnp.ones(shape[1:3], bool)

    def compared(params: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen, said = jax.random.normal(key, (2, *shape))
        ours = seen @ params["student"]["kernel"] + params["student"]["bias"].reshape(
            1, 1, 1, 1, -1
        )
        mapped = nnx.merge(graph, params["projector"])
        if direction == "teacher_to_student":
            return ours, mapped.project_teacher_kv("noise", said)
        return mapped.project_teacher_kv("noise", ours), said

    def loss(params: dict, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        s, t = compared(params, key)
        found = alignment(s, t, mask)
        return mercator(s, t, mask).value, (found["cos"].value[0], found["cos_shuffled"].value[0])

    def step(state: tuple, key: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        params, moments = state
        grads, seen = jax.grad(loss, has_aux=True)(params, key)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), seen

    keys = jax.random.split(jax.random.key(2), steps)
    start = (params, optimizer.init(params))
    _, course = jax.jit(lambda s: jax.lax.scan(step, s, keys))(start)
    return Course(*(np.asarray(x) for x in course))


def turned_keys(model: str, distances: np.ndarray, keys: int = 64) -> np.ndarray:
    """Mean cosine of a random key with itself so many positions later, both after RoPE."""
    spec = spec_from_config(KNOWN_CONFIGS[model], where=model)
    content = jax.random.normal(jax.random.key(0), (1, 1, keys, spec.head_dim))

    def at(positions: jax.Array) -> jax.Array:
        spread = jnp.broadcast_to(content, (1, positions.shape[1], keys, spec.head_dim))
        return rotate_layers(spread[None], rope_rotations(spec, positions))[0]

    here, later = (at(jnp.asarray(p)[None]) for p in (np.zeros_like(distances), distances))
    return np.asarray((unit(here) * unit(later)).sum(axis=-1).mean(axis=(0, 2)))
