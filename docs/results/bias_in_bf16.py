"""What a large key bias costs in bfloat16: keys without it, and attention itself.

    python docs/results/bias_in_bf16.py        writes docs/results/bias_in_bf16.json

One Qwen2 attention layer of random weights reads one random text, in float32 and in bfloat16, here
and in transformers (torch on the CPU); both have the same weights and the same input, which
bfloat16 holds exactly. The bias is so many times as long as the mean key without it. It lies in the
slowest pair of dimensions, which RoPE hardly turns, as the longest biases of real models do, or in
all of them. Every figure is 1 - cosine with float32's, over all vectors.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

from kava_jax.models.attend import attend
from kava_jax.models.layers import Activations, Attention, Dtypes
from kava_jax.models.masks import attention_mask
from kava_jax.models.rope import rope_rotations
from kava_jax.models.spec import DecoderSpec

TOKENS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, THETA = 256, 512, 8, 2, 64, 1e6
TIMES = (0, 1, 10, 30, 100, 200, 300)
PLACES = {"slowest pair": [HEAD_DIM // 2 - 1, HEAD_DIM - 1], "all dimensions": range(HEAD_DIM)}
SEEDS = range(4)


def weights(times: float, place: str, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Input [T, D] and kernels [in, out] with biases, all of them held exactly by bfloat16."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, WIDTH))
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    found = {
        name: rng.normal(size=shape) / np.sqrt(shape[0])
        for name, shape in {
            "q": (WIDTH, wide),
            "k": (WIDTH, narrow),
            "v": (WIDTH, narrow),
            "o": (wide, WIDTH),
        }.items()
    }
    content = np.linalg.norm((x @ found["k"]).reshape(-1, HEAD_DIM), axis=-1).mean()
    bias = np.zeros((KV_HEADS, HEAD_DIM))
    bias[:, list(PLACES[place])] = rng.normal(size=(KV_HEADS, len(PLACES[place])))
    bias *= times * content / np.linalg.norm(bias, axis=-1, keepdims=True)
    found["bias"] = bias.reshape(-1)

    def held(array: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)

    return held(x), {name: held(array) for name, array in found.items()}


def ours(x: np.ndarray, found: dict[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """Keys without bias, as they are read and as a subtraction gives them, and the output."""
    spec = DecoderSpec(
        "qwen2", 8, WIDTH, 8, 1, HEADS, KV_HEADS, HEAD_DIM, THETA, 1e-6, True, qkv_bias=True
    )
    layer = Attention(spec, dtypes=Dtypes(jnp.dtype("float32"), dtype), rngs=nnx.Rngs(0))
    for name in "qkvo":
        kernel = getattr(layer, name).kernel
        kernel[...] = jnp.asarray(found[name]).reshape(kernel.shape)
    assert layer.k.bias is not None
    layer.k.bias[...] = jnp.asarray(found["bias"]).reshape(layer.k.bias.shape)
    positions = jnp.arange(TOKENS)[None]
    mask = attention_mask(positions, positions, jnp.ones((1, TOKENS), bool))
    rotation = jax.tree.map(lambda part: part[0], rope_rotations(spec, positions))

    def run(x: jax.Array) -> tuple[jax.Array, Activations]:
        return layer(x, rotation, mask, None, attend)

    output, new = jax.jit(run)(jnp.asarray(x, dtype)[None])
    bias = layer.k.bias[...].astype(dtype)[None, None]
    return {
        "kava_keys": new.pre_bias,
        "subtracted_keys": new.pre_rope - bias,
        "kava_attention": output,
    }


def theirs(x: np.ndarray, found: dict[str, np.ndarray], dtype: Any) -> dict[str, torch.Tensor]:
    """The same of transformers, keys by subtraction alone."""
    config = Qwen2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rope_parameters={"rope_theta": THETA, "rope_type": "default"},
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]  (made at run time)
    )
    layer = Qwen2Attention(config, 0)
    names = {"q": layer.q_proj, "k": layer.k_proj, "v": layer.v_proj, "o": layer.o_proj}
    with torch.no_grad():
        for name, part in names.items():
            part.weight.copy_(torch.from_numpy(found[name].T))
            if part.bias is not None:
                part.bias.copy_(torch.from_numpy(found["bias"]) if name == "k" else 0 * part.bias)
        layer = layer.to(dtype).eval()
        tokens = torch.from_numpy(x).to(dtype)[None]
        turned = Qwen2RotaryEmbedding(config)(tokens, torch.arange(TOKENS)[None])
        hidden = torch.triu(torch.full((TOKENS, TOKENS), torch.finfo(dtype).min), 1)[None, None]
        output = layer(tokens, turned, hidden.to(dtype))[0]
        keys = layer.k_proj(tokens) - layer.k_proj.bias
    return {"transformers_keys": keys, "transformers_attention": output}


def apart(a: Any, b: Any) -> float:
    """1 - cosine, each side as one vector in float64."""
    x, y = (
        (side.double().numpy() if isinstance(side, torch.Tensor) else np.asarray(side, np.float64))
        for side in (a, b)
    )
    x, y = x.reshape(-1), y.reshape(-1)
    return float(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def measured(times: float, place: str) -> dict[str, float]:
    """Means over seeds."""
    rows = []
    for seed in SEEDS:
        x, found = weights(times, place, seed)
        wide, narrow = (ours(x, found, jnp.dtype(d)) for d in ("float32", "bfloat16"))
        wide_t, narrow_t = (theirs(x, found, d) for d in (torch.float32, torch.bfloat16))
        same = apart(wide["kava_attention"], wide_t["transformers_attention"])
        assert same < 1e-4, f"float32 attention differs by {same}: not the same layer"
        truth = {name: wide["kava_keys"] for name in wide if name.endswith("keys")}
        row = {name: apart(narrow[name], truth.get(name, wide[name])) for name in wide}
        keys = wide["kava_keys"].reshape(1, TOKENS, -1)
        row["transformers_keys"] = apart(narrow_t["transformers_keys"], keys)
        row["transformers_attention"] = apart(
            narrow_t["transformers_attention"], wide_t["transformers_attention"]
        )
        rows.append(row)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def main() -> None:
    """Measure, print, and write the JSON."""
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(1)
    rows = [
        {"place": place, "times": times} | measured(times, place)
        for place in PLACES
        for times in TIMES
    ]
    sizes = {"tokens": TOKENS, "width": WIDTH, "heads": HEADS, "kv_heads": KV_HEADS}
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    result = {"name": "bias_in_bf16", **sizes, "head_dim": HEAD_DIM, "rope_theta": THETA}
    result |= {"seeds": len(SEEDS), "versions": versions, "rows": rows}
    text = json.dumps(result, indent=1) + "\n"
    Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")
    for row in rows:
        print("  ".join(f"{x:.1e}" if isinstance(x, float) else f"{x!s:>14}" for x in row.values()))


if __name__ == "__main__":
    main()
