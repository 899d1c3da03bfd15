"""The sides of ``kava bench decode``: our decoding, and transformers' ``generate``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kava_jax.bench.peers import peer
from kava_jax.bench.turns import Ready
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.decoder import Decoder
from kava_jax.models.generate import generate

# -> new ids [B, M]
Decode = Callable[[], np.ndarray]


def ready(side: str, folder: Path) -> Ready:
    """``kava``, ``transformers`` or ``transformers_one_thread``, whose ids are in ``SIDE.npy``."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    prompt_BT, new_tokens = np.load(folder / "prompt.npy"), job["new_tokens"]
    if side == "kava":
        run = _ours(folder / "model", prompt_BT, new_tokens)
    else:
        if side == "transformers_one_thread":
            peer("torch").set_num_threads(1)
        run = _transformers(folder / "model", prompt_BT, new_tokens)
    np.save(folder / f"{side}.npy", run())
    return Ready({}, run)


def _ours(directory: Path, prompt_BT: np.ndarray, new_tokens: int) -> Decode:
    spec = read_spec(directory)
    params = load_decoder_params(directory, spec)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
    prompt, valid = jnp.asarray(prompt_BT), jnp.ones(prompt_BT.shape, bool)

    def run() -> np.ndarray:
        new = generate(
            graph, params, prompt, valid, max_new_tokens=new_tokens, eos_ids=(), pad_id=0
        )
        return np.asarray(jax.block_until_ready(new))

    return run


def _transformers(directory: Path, prompt_BT: np.ndarray, new_tokens: int) -> Decode:
    torch = peer("torch")
    model: Any = peer("transformers").AutoModelForCausalLM.from_pretrained(directory)
    prompt = torch.from_numpy(prompt_BT.astype(np.int64))
    model.generation_config.eos_token_id = None

    def run() -> np.ndarray:
        new = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return new[:, prompt.shape[1] :].numpy()

    return run
