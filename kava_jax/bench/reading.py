"""``kava bench input`` and ``kava bench import``: how fast rows and weights come in."""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kava_jax.bench.pairs import Sizes, geometry, write_model
from kava_jax.bench.timing import alternate, circumstances, summary
from kava_jax.data.batches import BatchStream
from kava_jax.data.problems import WordProblems
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.hf.load import load_decoder_params
from kava_jax.hf.names import parameter_shapes
from kava_jax.models.decoder import Decoder
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from kava_jax.training.parts import Part, place_slices

ROWS, BATCH, LENGTH, BATCHES = 2048, 32, 128, 20


class ModelSizes(NamedTuple):
    """The model that is imported: by default a gigabyte in float32."""

    model: Sizes = (16, 1024, 16, 8, 4096)
    vocabulary: int = 8192


def bench_input() -> dict[str, Any]:
    """Tokens a second of encoding text, of making batches, and of putting them on the devices.

    Encoding happens once, before the first step; batches are made while the devices compute, so
    what matters is that ``batch`` and ``put`` together are faster than any step.
    """
    encoder = Encoder(builtin_tokenizer(), format="qa", template=None, max_length=LENGTH)
    problems = list(WordProblems("train", 0, ROWS))
    rows = [encoder.encode(problem) for problem in problems]
    stream = BatchStream(rows, batch_size=BATCH, max_length=LENGTH, seed=0, bucket=16)
    batches, mesh = [stream.batch(number) for number in range(BATCHES)], make_mesh()
    work = {
        "encode": lambda: [encoder.encode(problem) for problem in problems[: BATCH * BATCHES]],
        "batch": lambda: [stream.batch(number) for number in range(BATCHES)],
        "put": lambda: jax.block_until_ready([put_batch(batch, mesh) for batch in batches]),
    }
    seconds = {name: summary(own) for name, own in alternate(work).items()}  # pyright: ignore[reportArgumentType]  (results are dropped)
    tokens = sum(int(batch.valid.sum()) for batch in batches)
    return {
        "name": "input",
        "rows_of_a_batch": BATCH,
        "batches": BATCHES,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / own["median"] for name, own in seconds.items()},
        **circumstances(),
    }


def bench_import(sizes: ModelSizes) -> dict[str, Any]:
    """Bytes a second of importing a Hugging Face directory, beside only reading its files."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        rng = np.random.default_rng(0)
        spec = write_model(directory, geometry(sizes.model, sizes.vocabulary), rng)
        part = Part.of(lambda rngs: Decoder(spec, rngs=rngs), make_mesh(1, -1, 1))
        size = 4 * sum(math.prod(shape) for shape in parameter_shapes(spec).values())
        files = sorted(directory.glob("*.safetensors"))
        put = partial(place_slices, part.shardings)
        work = {
            "import": lambda: jax.block_until_ready(load_decoder_params(directory, spec, put=put)),
            "read": lambda: [np.fromfile(file, np.uint8) for file in files],
        }
        seconds = {name: summary(own) for name, own in alternate(work).items()}  # pyright: ignore[reportArgumentType]  (results are dropped)
    return {
        "name": "import",
        "sizes": sizes._asdict(),
        "bytes": size,
        "seconds": seconds,
        "bytes_per_second": {name: size / own["median"] for name, own in seconds.items()},
        "times_reading": seconds["import"]["median"] / seconds["read"]["median"],
        **circumstances(),
    }
