"""The modules of a run: how each is built, where its parameters lie, how its weights come in."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.hf.load import load_decoder_params
from kava_jax.models.decoder import Params
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.sharding import Indivisible, param_shardings
from kava_jax.training.objective import TeacherLink


@dataclass(frozen=True)
class Part:
    """One module: how to build it, and where its parameters lie."""

    graph: nnx.GraphDef[Any]
    build: Any
    abstract: Any
    shardings: Params
    misfits: tuple[str, ...]
    """Axes that are repeated because the mesh does not divide them."""

    @classmethod
    def of(cls, build: Any, mesh: Mesh, indivisible: Indivisible = "error") -> "Part":
        """Trace ``build(rngs=...)`` without allocating anything."""
        graph, abstract = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
        # ``eval_shape`` drops shardings, so they are found by the names of the axes.
        shardings, misfits = param_shardings(abstract, mesh, indivisible)
        return cls(graph, build, abstract, shardings, tuple(misfits))

    def fresh(self, seed: int) -> Params:
        """Random parameters, created where they lie: no device ever holds the whole."""

        def init(seed: Array) -> Params:
            module = self.build(rngs=nnx.Rngs(jax.random.key(seed)))
            return nnx.to_pure_dict(nnx.split(module)[1])

        # The seed is an argument and no constant, so that all seeds share one program.
        return jax.jit(init, out_shardings=self.shardings)(jnp.uint32(seed))


@dataclass(frozen=True)
class TeacherPart:
    """A teacher's module, cut after its last mapped layer, and where its weights are."""

    part: Part
    spec: DecoderSpec
    directory: Path
    link: TeacherLink
    blocks: int
    tail: bool
    headless: bool
    dtype: Any
    seed: int
    """Of random weights, where the control asks for them."""
    map_note: str | None
    """How the layer map was chosen, where the config does not say."""

    @property
    def layer_map(self) -> LayerMap:
        """Which of its layers the student's are compared with."""
        return self.link.comparison.layer_map

    def load(self) -> Params:
        """Read the weights that are needed, each straight to its place on the mesh.

        Under the control ``random`` they are drawn instead.
        """
        if self.link.control == "random":
            return self.part.fresh(self.seed)
        return load_decoder_params(
            self.directory,
            self.spec,
            layers=self.blocks,
            tail=self.tail,
            head=not self.headless,
            param_dtype=self.dtype,
            put=partial(place_slices, self.part.shardings),
        )


def place_slices(
    shardings: Params, path: str, shape: tuple[int, ...], dtype: np.dtype, read: Any
) -> Any:
    """Place one parameter: every device's slice is read from disk by itself."""
    sharding: Any = shardings
    for name in path.split("/"):
        sharding = sharding[name]
    return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)
