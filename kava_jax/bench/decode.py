"""``kava bench decode``: greedy decoding, beside transformers on the same model directory."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from kava_jax.bench.peers import beside, peer, product_speed
from kava_jax.bench.timing import circumstances
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.errors import KavaError
from kava_jax.hf.export import export_model
from kava_jax.hf.geometry import spec_from_config
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.hf.names import parameter_shapes
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.generate import generate
from kava_jax.models.spec import DecoderSpec
from kava_jax.plan.floor import layer_flops

# -> new ids [B, M]
Decode = Callable[[], np.ndarray]


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
    peer("torch")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        _write_model(directory, sizes)
        spec = read_spec(directory)
        params = load_decoder_params(directory, spec)
        model = peer("transformers").AutoModelForCausalLM.from_pretrained(directory)
    prompt_BT = np.random.default_rng(1).integers(
        0, sizes.vocabulary, (sizes.rows, sizes.prompt), np.int32
    )
    ours = _ours(spec, params, prompt_BT, sizes.new_tokens)
    theirs = _transformers(model, prompt_BT, sizes.new_tokens)
    _check_tokens(ours(), theirs())
    work = {"kava": ours, "transformers": theirs, "transformers_one_thread": _one_thread(theirs)}
    found = beside(work, "kava")
    speed, floor = product_speed(sizes.square), _floor(spec, sizes)
    median = found["seconds"]["kava"]["median"]
    return {
        "name": "decode",
        "sizes": sizes._asdict(),
        **found,
        "tokens_per_second": sizes.rows * sizes.new_tokens / median,
        "floor_flops": floor,
        "share_of_floor": floor / speed / median,
        **circumstances(),
        "torch": peer("torch").__version__,
    }


def _write_model(directory: Path, sizes: Sizes) -> None:
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.width,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.inner,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.prompt + sizes.new_tokens,
        "tie_word_embeddings": True,
    }
    spec, rng = spec_from_config(config, where="bench"), np.random.default_rng(0)
    flat = {
        path: rng.normal(path.endswith("scale"), 0.1, shape).astype(np.float32)
        for path, shape in parameter_shapes(spec).items()
    }
    params, tokenizer = unflatten_dict(flat, sep="/"), builtin_tokenizer()
    export_model(directory, params, spec, dtype="float32", tokenizer=tokenizer, card="random")


def _ours(spec: DecoderSpec, params: Params, prompt_BT: np.ndarray, new_tokens: int) -> Decode:
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
    prompt, valid = jnp.asarray(prompt_BT), jnp.ones(prompt_BT.shape, bool)

    def run() -> np.ndarray:
        new = generate(
            graph, params, prompt, valid, max_new_tokens=new_tokens, eos_ids=(), pad_id=0
        )
        return np.asarray(jax.block_until_ready(new))

    return run


def _transformers(model: Any, prompt_BT: np.ndarray, new_tokens: int) -> Decode:
    torch = peer("torch")
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


def _one_thread(run: Decode) -> Decode:
    torch = peer("torch")

    def alone() -> np.ndarray:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return alone


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
