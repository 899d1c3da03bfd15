"""``kava bench handoff``: answers from a handed-over cache, against either model by itself.

The reader is the pair's teacher and the answerer its student, both with random weights, which cost
what trained ones do. Prompts are not padded, and no answer ends early.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from kava_jax.alignment.handoff import Handoff
from kava_jax.alignment.layer_map import make_layer_map
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.bench.harness import Facts, Side, compare
from kava_jax.bench.pairs import Pair
from kava_jax.cache import KVCache
from kava_jax.hf.config_json import spec_from_config
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.generate import generate
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import layer_rotations
from kava_jax.models.spec import DecoderSpec

PROMPTS, ANSWERS = (64, 256, 1024), (16, 64)


def bench_handoff(
    pair: Pair = Pair(),  # noqa: B008  (a NamedTuple)
    prompts: tuple[int, ...] = PROMPTS,
    answers: tuple[int, ...] = ANSWERS,
) -> Facts:
    """Seconds and bytes by length of prompt and answer, ``pair.rows`` prompts at once.

    Sides: ``handed``, all of it; ``reading``, its part before the first answer token (the reader's
    pass and the projector), which several answers to one prompt share; ``teacher`` and ``student``,
    each by itself. Bytes are of the caches of one prompt.
    """
    cases = {}
    for prompt in prompts:
        for new in answers:
            given = (pair, prompt, new)
            sides = {"handed": partial(_handed, *given), "reading": partial(_reading, *given)}
            sides |= {name: partial(_alone, name, *given) for name in ("teacher", "student")}
            cases[f"{prompt} + {new}"] = compare(sides) | {"prompt": prompt, "answer": new}
    return {"pair": pair._asdict(), "cases": cases}


def _spec(pair: Pair, name: str) -> DecoderSpec:
    return spec_from_config(getattr(pair, name), where="bench")


def _model(pair: Pair, name: str) -> tuple[nnx.GraphDef[Decoder], Params]:
    graph, weights = nnx.split(Decoder(_spec(pair, name), rngs=nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(weights)


def _prompt(pair: Pair, length: int) -> Int[Array, "B T"]:
    vocabulary = min(_spec(pair, name).vocab_size for name in ("teacher", "student"))
    drawn = np.random.default_rng(1).integers(0, vocabulary, (pair.rows, length), np.int32)
    return jnp.asarray(drawn)


def _handoff(teacher: DecoderSpec, student: DecoderSpec) -> Handoff:
    heads = {"d_model": teacher.kv_width, "num_heads": teacher.num_kv_heads}
    projector = KVDimensionProjector(
        {"teacher": heads | {"num_layers": student.num_layers}},
        student.kv_width,
        kind="linear",
        student_heads=student.num_kv_heads,
        per_layer=True,
    )
    layer_map = make_layer_map("ratio", teacher.num_layers, student.num_layers)
    return Handoff(projector, {"teacher": layer_map}, {"teacher": 1.0})


def _carrying(pair: Pair, prompt_BT: Int[Array, "B T"]) -> Callable[[], KVCache]:
    """What reads all tokens of the prompt but the last, and hands the cache over."""
    specs = _spec(pair, "teacher"), _spec(pair, "student")
    reader, weights = _model(pair, "teacher")
    # As arguments, since constants of a program are computed with when it is compiled.
    handoff = _handoff(*specs)
    graph, of_projector = nnx.split(handoff.projector)
    layers = handoff.maps["teacher"].read_layers
    maps = {"teacher": handoff.maps["teacher"].among(layers)}

    @jax.jit
    def carry(weights: Params, of_projector: nnx.State, tokens_BT: Array) -> KVCache:
        valid_BT = jnp.ones(tokens_BT.shape, bool)
        positions_BT = token_positions(valid_BT)
        mask = attention_mask(positions_BT, positions_BT, valid_BT)
        _, cache = nnx.merge(reader, weights)(
            tokens_BT, positions_BT, mask, key_space="pre_rope", layers=layers
        )
        own = replace(handoff, projector=nnx.merge(graph, of_projector), maps=maps)
        return own({"teacher": cache}, layer_rotations(specs[1], positions_BT))

    return partial(carry, weights, of_projector, prompt_BT[:, :-1])


def _reading(pair: Pair, prompt: int, new: int) -> Side:
    """The part that does not depend on the answer."""
    carry = _carrying(pair, _prompt(pair, prompt))
    return Side(lambda: jax.block_until_ready(carry()), compared=False)


def _handed(pair: Pair, prompt: int, new: int) -> Side:
    prompt_BT = _prompt(pair, prompt)
    carry, answer = _carrying(pair, prompt_BT), _answering(pair, "student", prompt_BT, new)
    return Side(
        lambda: jax.block_until_ready(answer(past=carry())), _bytes(pair, prompt), compared=False
    )


def _alone(name: str, pair: Pair, prompt: int, new: int) -> Side:
    answer = _answering(pair, name, _prompt(pair, prompt), new)
    return Side(lambda: jax.block_until_ready(answer()), compared=False)


def _answering(pair: Pair, name: str, prompt_BT: Int[Array, "B T"], new: int) -> Callable[..., Any]:
    valid_BT = jnp.ones(prompt_BT.shape, bool)
    given = (*_model(pair, name), prompt_BT, valid_BT)
    return partial(generate, *given, max_new_tokens=new, eos_ids=(), pad_id=0)


def _bytes(pair: Pair, prompt: int) -> Facts:
    """Of one prompt's caches in float32: what is handed over, and the teacher's own."""
    sizes = {}
    for side, name in (("handed_bytes", "student"), ("teacher_bytes", "teacher")):
        spec = _spec(pair, name)
        sizes[side] = spec.num_layers * 2 * spec.kv_width * 4 * (prompt - 1)
    return sizes
