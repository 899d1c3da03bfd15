"""``kava bench decode``: greedy decoding, compared with transformers on the same model."""

import importlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kava_jax.bench.harness import Facts, Side, compare, peer_version
from kava_jax.bench.pairs import qwen2, write_model
from kava_jax.hf.load import load_model
from kava_jax.models.generate import generate

MODEL = qwen2(2, 16, 4, 2, 32, vocabulary=512) | {"initializer_range": 0.1}


def bench_decode(rows: int = 16, prompt: int = 32, new_tokens: int = 64) -> Facts:
    """``rows`` prompts continued greedily by ``new_tokens`` each, none of which ends a row.

    Transformers runs with PyTorch's own number of threads, and with one, which suits small
    matrices. Raises KavaError without PyTorch, and where a token differs.
    """
    torch = peer_version("torch")
    prompt_BT = np.random.default_rng(1).integers(0, 512, (rows, prompt), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        write_model(directory, MODEL, seed=0)
        given = (directory, prompt_BT, new_tokens)
        sides = {
            "kava": partial(_ours, *given),
            "transformers": partial(_transformers, *given),
            "transformers_one_thread": partial(_transformers, *given, threads=1),
        }
        # Tokens are whole numbers: the default tolerance of 0 demands the same ones.
        found = compare(sides)
    return {"model": MODEL, "rows": rows, "prompt": prompt, **found, "torch": torch}


def _ours(directory: Path, prompt_BT: np.ndarray, new_tokens: int) -> Side:
    graph, params = load_model(directory)
    prompt, valid = jnp.asarray(prompt_BT), jnp.ones(prompt_BT.shape, bool)
    new = partial(generate, graph, params, max_new_tokens=new_tokens, eos_ids=(), pad_id=0)
    facts = {"tokens": len(prompt_BT) * new_tokens}
    return Side(lambda: jax.block_until_ready(new(prompt, valid)), facts)


def _transformers(
    directory: Path, prompt_BT: np.ndarray, new_tokens: int, threads: int | None = None
) -> Side:
    torch: Any = importlib.import_module("torch")
    # The number of threads holds for the whole process, so each variant needs its own.
    if threads is not None:
        torch.set_num_threads(threads)
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    prompt = torch.from_numpy(prompt_BT.astype(np.int64))
    # Else a row that draws this id ends early, and the sides do unequal work.
    model.generation_config.eos_token_id = None

    def run() -> Any:
        new = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return new[:, prompt.shape[1] :]

    return Side(run, {"tokens": len(prompt_BT) * new_tokens})
