"""``kava bench decode``: greedy decoding, beside transformers on the same model directory."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kava_jax.bench import timing
from kava_jax.bench.pairs import geometry, write_model
from kava_jax.bench.peers import peer, product_speed
from kava_jax.bench.turns import Facts, Taken, take_turns
from kava_jax.errors import KavaError
from kava_jax.models.spec import DecoderSpec
from kava_jax.plan.floor import layer_flops

SIDES = ("kava", "transformers", "transformers_one_thread")


class Sizes(NamedTuple):
    """A random model of Qwen2's shape, and what it is asked for."""

    layers: int = 2
    width: int = 16
    heads: int = 4
    kv_heads: int = 2
    inner: int = 32
    vocabulary: int = 512
    rows: int = 16
    prompt: int = 32
    new_tokens: int = 64
    square: int = 2048
    """Width of the matrices whose product measures the machine."""


def bench_decode(sizes: Sizes) -> dict[str, Any]:
    """``rows`` prompts continued greedily by ``new_tokens`` each, none of which ends a row.

    Transformers runs with PyTorch's own number of threads, and with one, which suits small
    matrices. ``floor_flops`` are those of the forward passes: layers over prompt and new tokens,
    the LM head over new tokens, ``2 * weights + attention`` each; ``share_of_floor`` is the time in
    which a plain matrix product does as many, over ours.

    Raises KavaError without PyTorch, and where the tokens differ.
    """
    version = peer("torch").__version__
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = _write_job(folder, sizes)

        def check(first: Mapping[str, Facts]) -> None:
            ours, *theirs = (np.load(folder / f"{side}.npy") for side in first)
            for tokens in theirs:
                _check_tokens(ours, tokens)

        taken = take_turns("kava_jax.bench.decode_sides", SIDES, folder, check)
    seconds = {side: own.seconds for side, own in taken.items() if isinstance(own, Taken)}
    found = timing.compared(seconds, "kava")
    speed, floor = product_speed(sizes.square), _floor(spec, sizes)
    median = found["seconds"]["kava"]["median"]
    return {
        "name": "decode",
        "sizes": sizes._asdict(),
        **found,
        "tokens_per_second": sizes.rows * sizes.new_tokens / median,
        "floor_flops": floor,
        "share_of_floor": floor / speed / median,
        **timing.circumstances(),
        "torch": version,
    }


def _write_job(folder: Path, sizes: Sizes) -> DecoderSpec:
    """A random model, prompts, and how many tokens to add."""
    config = geometry(sizes[:5], sizes.vocabulary)
    spec = write_model(folder / "model", config, np.random.default_rng(0), std=0.1)
    prompts, shape = np.random.default_rng(1), (sizes.rows, sizes.prompt)
    np.save(folder / "prompt.npy", prompts.integers(0, sizes.vocabulary, shape, np.int32))
    (folder / "job.json").write_text(json.dumps({"new_tokens": sizes.new_tokens}), encoding="utf-8")
    return spec


def _check_tokens(ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.shape != theirs.shape or (ours != theirs).any():
        same = (ours == theirs).mean() if ours.shape == theirs.shape else 0.0
        raise KavaError(
            f"transformers gives other tokens than we do ({same:.0%} agree); it does other work, "
            f"so its time would say nothing"
        )


def _floor(spec: DecoderSpec, sizes: Sizes) -> float:
    length = sizes.prompt + sizes.new_tokens
    layers = spec.num_layers * layer_flops(spec, length) * length
    head = 2.0 * spec.hidden_size * spec.vocab_size * sizes.new_tokens
    return sizes.rows * (layers + head)
