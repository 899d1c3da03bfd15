"""The one real pretrained model: published greedy text, and transformers' loss on real text."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.generate import generate
from kava_jax.models.masks import attention_mask, token_positions
from tests.tiny_models import load_decoder
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def directory(shared):
    return shared / "models" / "stories260k"


@pytest.fixture(scope="module")
def tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_greedy_text_equals_the_published_one(directory, tokenizer):
    spec = read_spec(directory)
    graph, _ = nnx.split(load_decoder(directory))
    new = generate(
        graph,
        load_decoder_params(directory, spec),
        jnp.array([[tokenizer.bos_token_id]]),
        jnp.ones((1, 1), bool),
        max_new_tokens=256,
        eos_ids=(1, 2),
        pad_id=0,
    )
    golden = (directory / "golden_greedy.txt").read_text(encoding="utf-8")
    text = tokenizer.decode(np.asarray(new[0]).tolist(), skip_special_tokens=True)
    assert text.strip() == golden.strip()


def test_loss_on_real_text_equals_transformers(directory, tokenizer, shared):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    stories = shared / "data" / "tinystories" / "tinystories_2mib.txt"
    text = stories.read_text(encoding="utf-8").split("<|endoftext|>")
    rows = [tokenizer(story.strip()).input_ids[:128] for story in text[:4]]
    length = max(map(len, rows))
    valid = np.array([[i < len(row) for i in range(length)] for row in rows])
    tokens = np.array([row + [0] * (length - len(row)) for row in rows])

    model = load_decoder(directory)
    valid_BT = jnp.asarray(valid)
    positions = token_positions(valid_BT)
    mask = attention_mask(positions, positions, valid_BT)
    hidden, _ = model(jnp.asarray(tokens), positions, mask)
    logits = np.asarray(model.logits(hidden), np.float64)[:, :-1]
    top = logits.max(-1)
    log_total = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    picked = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    ours = (log_total - picked)[valid[:, 1:]].mean()

    labels = torch.from_numpy(np.where(valid, tokens, -100))
    with torch.no_grad():
        theirs = (
            AutoModelForCausalLM.from_pretrained(directory)
            .eval()(
                torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(valid.astype(np.int64)),
                labels=labels,
            )
            .loss.item()
        )
    assert abs(ours - theirs) < TOL["parity"]
    assert 1.0 < ours < 2.0  # the model knows this text: a loss that is merely equal proves less
