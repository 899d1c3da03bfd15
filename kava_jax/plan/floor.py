"""The fewest operations that a training step of this kind can do: what its speed is measured by.

Model FLOPs in the usual sense: two for every weight of a matrix product and token, three times that
where there is a backward pass, attention over the causal half, and nothing for recomputation.
"""

import math
from typing import Any

from flax import nnx

from kava_jax.models.spec import DecoderSpec
from kava_jax.runs.blueprint import Blueprint


def step_floor(blueprint: Blueprint, rows: int, length: int, targets: int) -> dict[str, float]:
    """FLOPs of one step over ``rows x length`` tokens, ``targets`` of which are predicted.

    By part, over all devices: ``teachers``, ``student`` (without its LM head), ``heads`` (of the
    student, and of teachers whose logits are used) and ``projector`` (and the handoff's).

    A teacher costs one forward pass up to its last mapped layer, of which only keys and values are
    projected; the student three times its forward pass; LM heads run at predicted positions alone:
    ``2 * rows * length * (weights + heads * head_dim * (length + 1))`` per layer and pass. The
    projector's weights meet every mapped layer's tokens; its input needs a gradient only when it
    maps the student. A teacher that answers from the student's cache runs again, and its input,
    not its weights, has a gradient.
    """
    handoff = blueprint.config.loss.handoff
    tokens = rows * length
    teachers, heads = 0.0, 3 * 2.0 * _head(blueprint.student_spec) * targets
    for teacher in blueprint.teachers.values():
        # Where keys and values are compared, a headless teacher's last mapped layer is its tail.
        teachers += tokens * teacher.blocks * layer_flops(teacher.spec, length)
        if teacher.tail:
            teachers += 2.0 * tokens * _keys_values(teacher.spec)
        if blueprint.objective.kl_weight is not None:
            heads += 2.0 * _head(teacher.spec) * targets
        if handoff is not None and handoff.reader == "student":
            teachers += 2 * tokens * teacher.blocks * layer_flops(teacher.spec, length)
            heads += 2 * 2.0 * _head(teacher.spec) * targets
    student = 3 * tokens * blueprint.student_spec.num_layers
    student *= layer_flops(blueprint.student_spec, length)
    projector = _projector(blueprint, tokens)
    if handoff is not None and blueprint.handoff is not None:
        passes = 2 + (handoff.reader == "student")
        projector += passes * 2.0 * tokens * sum(_kernels(blueprint.handoff.abstract))
    return {"teachers": teachers, "student": student, "heads": heads, "projector": projector}


def layer_flops(spec: DecoderSpec, length: int) -> float:
    """Forward FLOPs of one decoder layer for one token of ``length``, on average over positions."""
    width, queries = spec.hidden_size, spec.num_heads * spec.head_dim
    experts = spec.experts_per_token or 1
    weights = 2 * width * queries + _keys_values(spec) + width * spec.num_experts
    weights += 3 * width * spec.intermediate_size * experts
    # Scores and weighted sum, 2 FLOPs each per query entry and attended token: (length + 1) / 2.
    return 2.0 * weights + 4.0 * queries * (length + 1) / 2


def _keys_values(spec: DecoderSpec) -> int:
    return 2 * spec.hidden_size * spec.kv_width


def _head(spec: DecoderSpec) -> int:
    return spec.hidden_size * spec.vocab_size


def _projector(blueprint: Blueprint, tokens: int) -> float:
    if blueprint.projector is None:
        return 0.0
    settings = blueprint.config.projector
    total = 0.0
    # Without parameters there are no pairs either.
    for name, pair in blueprint.projector.abstract.get("pairs", {}).items():
        layers = len(blueprint.teachers[name].layer_map)
        # With weights of its own, a layer's tokens meet only those.
        repeats = 1 if settings.per_layer else layers
        total += 2.0 * tokens * sum(_kernels(pair)) * repeats
    # Backward to the kernels unless they are frozen, and to the input where it is the student's.
    passes = 1 + (settings.training != "frozen")
    return total * (passes + (settings.direction == "student_to_teacher"))


def _kernels(weights: Any) -> list[int]:
    """Sizes of the matrices; norms and biases take part in no matrix product."""
    return [
        math.prod(variable.get_value().shape)
        for path, variable in nnx.to_flat_state(weights)
        if "kernel" in str(path[-1])
    ]
