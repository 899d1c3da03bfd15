"""Exact match on GSM8K-format data: greedy text in, strict and flexible accuracy out.

How tokens are generated is handed in, so this module knows neither models nor JAX. Left out on
purpose: few-shot prompts (lm-evaluation-harness on the export does that) and sampling.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from kava_jax.data.example import Example
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import pad_id
from kava_jax.errors import KavaError
from kava_jax.evaluation.answers import flexible_answer, gold_answer, same, strict_answer

STOPS = ("Question:", "</s>", "<|im_end|>")
"""Text that ends an answer, as in lm-evaluation-harness ``gsm8k``."""

Generate = Callable[
    [Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]],
    Int[np.ndarray, "B M"],
]
"""(prompt ids, valid), padded on the *left* -> up to M new ids a row, whatever after the eos."""

_BUCKET = 32  # prompt lengths are rounded up to this, so that few shapes are compiled


class Sample(NamedTuple):
    """One question with what was generated for it (cut at its end) and the wanted answer."""

    question: str
    generated: str
    gold: str
    strict: bool
    """Right by the strict rule."""
    flexible: bool


class ExactMatch(NamedTuple):
    """Share of rows answered exactly, by both rules, each with its standard error (0 to 1)."""

    rows: int
    strict: float
    strict_error: float
    flexible: float
    flexible_error: float
    samples: tuple[Sample, ...]


def exact_match(
    generate: Generate,
    encoder: Encoder,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> ExactMatch:
    """Generate an answer for every example and compare its final number with the wanted one.

    Args:
        generate: see ``Generate``; always called with ``batch_size`` rows (the last batch repeats a
            row) and a prompt length that is a multiple of 32.
        encoder: gives the prompt ids that were trained on.
        examples: rows with a prompt, in the order of ``samples``.
        batch_size: rows generated at once.
        max_new_tokens: longest answer; what ``generate`` gives beyond it is ignored.

    Raises:
        KavaError: there are no examples, or one has no prompt.
    """
    if not examples:
        raise KavaError("exact match needs at least one row; give a data set that is not empty")
    prompts = [encoder.encode_prompt(example) for example in examples]
    # Prompts of similar length share a batch, so little is padded and few lengths are compiled.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        # A last batch with fewer rows would be another shape to compile.
        filled = places + places[-1:] * (batch_size - len(places))
        new_BM = generate(*_left_padded([prompts[i] for i in filled], pad_id(encoder.tokenizer)))
        for i, new_M in zip(places, new_BM, strict=False):
            texts[i] = _answer_text(np.asarray(new_M)[:max_new_tokens], encoder)
    return _scored(examples, texts)


def _left_padded(
    prompts: Sequence[np.ndarray], pad: int
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    length = max(-(-max(map(len, prompts)) // _BUCKET), 1) * _BUCKET
    tokens_BT = np.full((len(prompts), length), pad, np.int32)
    valid_BT = np.zeros((len(prompts), length), bool)
    for b, prompt in enumerate(prompts):
        # On the left, so that the first new token of every row has the same slot in the cache.
        tokens_BT[b, length - len(prompt) :] = prompt
        valid_BT[b, length - len(prompt) :] = True
    return tokens_BT, valid_BT


def _answer_text(new_M: np.ndarray, encoder: Encoder) -> str:
    tokenizer = encoder.tokenizer
    # The student's config may know further ends. Whichever it was, pad ids follow it.
    ended = (new_M == tokenizer.eos_token_id) | (new_M == pad_id(tokenizer))
    if ended.any():
        new_M = new_M[: int(ended.argmax())]
    text = str(tokenizer.decode(new_M.tolist()))
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def _scored(examples: Sequence[Example], texts: Sequence[str]) -> ExactMatch:
    samples = []
    for example, text in zip(examples, texts, strict=True):
        answer = example.reply
        right = same(strict_answer(text), answer), same(flexible_answer(text), answer)
        samples.append(Sample(example.question, text, gold_answer(answer), *right))
    strict, flexible = ([getattr(s, rule) for s in samples] for rule in ("strict", "flexible"))
    return ExactMatch(len(samples), *_share(strict), *_share(flexible), samples=tuple(samples))


def _share(right: Sequence[bool]) -> tuple[float, float]:
    """Mean and its standard error with the sample's own spread, as the harness reports it."""
    mean = sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / max(len(right) - 1, 1))
