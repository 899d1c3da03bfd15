"""``kava bench handoff``: answers from a handed-over cache, against either model by itself.

The reader is the pair's teacher and the answerer its student, both with random weights, which cost
what trained ones do. Prompts are not padded, and no answer ends early.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kava_jax.bench.harness import Facts, Side, compare
from kava_jax.bench.pairs import Pair, batch_of
from kava_jax.cache import KVCache
from kava_jax.models.generate import generate
from kava_jax.runs.blueprint import Blueprint
from kava_jax.runs.handed import reading

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
        asked = pair._replace(length=prompt)
        for new in answers:
            sides = {
                "handed": partial(_handed, asked, new),
                "reading": partial(_reading, asked),
                # Whoever answers is the student of its run.
                "teacher": partial(_alone, asked._replace(student=pair.teacher), new),
                "student": partial(_alone, asked, new),
            }
            cases[f"{prompt} + {new}"] = compare(sides) | {"prompt": prompt, "answer": new}
    return {"pair": pair._asdict(), "cases": cases}


def _reading(pair: Pair) -> Side:
    """The part that does not depend on the answer."""
    carry = _carrying(_handing(pair))
    return Side(lambda: jax.block_until_ready(carry()), compared=False)


def _handed(pair: Pair, new: int) -> Side:
    run = _handing(pair)
    carry, answer, facts = _carrying(run), _answering(run, new), {}
    # Of one prompt's caches in float32: what is handed over, and the teacher's own.
    specs = {"handed_bytes": run.student_spec, "teacher_bytes": run.teachers["teacher"].spec}
    for name, spec in specs.items():
        facts[name] = spec.num_layers * 2 * spec.kv_width * 4 * (pair.length - 1)
    return Side(lambda: jax.block_until_ready(answer(past=carry())), facts, compared=False)


def _alone(pair: Pair, new: int) -> Side:
    answer = _answering(pair.run(), new)
    return Side(lambda: jax.block_until_ready(answer()), compared=False)


def _handing(pair: Pair) -> Blueprint:
    return pair.run({"loss.handoff.reader": "teacher"})


def _carrying(run: Blueprint) -> Callable[[], KVCache]:
    """What reads all tokens of the prompt but the last, and hands the cache over."""
    assert run.handoff is not None
    readers = {name: teacher.link.graph for name, teacher in run.teachers.items()}
    given = (run.handoff.fresh(0), run.load_teachers())
    prompt_BT, valid_BT = _prompt(run)
    read = reading(run, readers, *given, answerer=run)
    return partial(read, prompt_BT, valid_BT, valid_BT.sum(axis=1))


def _answering(run: Blueprint, new: int) -> Callable[..., Any]:
    given = (run.student.graph, run.student_start(), *_prompt(run))
    return partial(generate, *given, max_new_tokens=new, eos_ids=(), pad_id=0)


def _prompt(run: Blueprint) -> tuple[jax.Array, jax.Array]:
    batch, _ = batch_of(run, 0)
    return jnp.asarray(batch.tokens), jnp.asarray(batch.valid)
