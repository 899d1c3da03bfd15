"""``KVDimensionProjector``: adapters of one teacher's keys and values, or of another set of parts.

The projector is on the teacher's side (``teacher_to_student``, the original) or on the
student's (``student_to_teacher``: the target is the teacher's own cache and cannot drift; it is
dropped at export). Choosing layers is the layer map's work, not the projector's.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from kava_jax.alignment.adapters import Adapter, AdapterKind, InitMethod
from kava_jax.errors import KavaError

Direction = Literal["teacher_to_student", "student_to_teacher"]
# Arguments of the constructor that are kept as they come.
_KEPT = ("mlp_ratio", "dropout", "init_method", "trainable", "kind", "direction", "per_layer")


def forgets_length(kind: AdapterKind, direction: Direction) -> bool:
    """Whether the student's vectors meet a norm before they are compared.

    How long they come out is then the projector's doing alone, so a loss of lengths cannot teach
    the student anything.
    """
    return kind == "elastic" and direction == "student_to_teacher"


class KVDimensionProjector(nnx.Module):
    """Bridges the KV widths of one student and any number of teachers.

    Args:
        teacher_configs: per teacher ``{"d_model": width of its vectors}``, and optionally
            ``"num_heads"`` (KV heads within that width) and ``"num_layers"`` (mapped layers, which
            ``per_layer`` needs). ``d_model`` is the width of the vectors that are passed in, which
            under grouped-query attention is ``num_key_value_heads * head_dim``.
        student_d_model: width of the student's vectors, likewise.
        mlp_ratio: hidden width of the elastic adapter over its input width.
        dropout: rate inside the elastic adapter, applied only when a key is given.
        init_method: ``xavier``, ``kaiming`` or ``normal``.
        trainable: when False no gradient reaches the adapters' weights (it still passes through).
        kind: ``elastic`` (LayerNorm, Linear, SiLU, Dropout, Linear), ``linear``, or ``identity``,
            which has no weights and takes equal heads on both sides.
        direction: which side is mapped onto the other.
        student_heads: KV heads within ``student_d_model``.
        per_layer: one set of weights per mapped layer, instead of one shared by all.
        parts: what is mapped, each with weights of its own: keys and values, or other vectors.
        rngs: source of the initial weights; seed 0 when absent.

    Raises KavaError for widths that heads do not divide, for ``per_layer`` without layers, and for
    ``identity`` between heads that differ.
    """

    def __init__(
        self,
        teacher_configs: Mapping[str, Mapping[str, int]],
        student_d_model: int,
        mlp_ratio: float = 1.0,
        dropout: float = 0.1,
        init_method: InitMethod = "xavier",
        trainable: bool = True,
        *,
        kind: AdapterKind = "elastic",
        direction: Direction = "teacher_to_student",
        student_heads: int = 1,
        per_layer: bool = False,
        parts: Sequence[str] = ("k", "v"),
        rngs: nnx.Rngs | None = None,
    ):
        """Build one adapter per teacher and part."""
        # Not a default argument: an Rngs counts what it has drawn, and projectors would share one.
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.kind: AdapterKind = kind
        self.direction: Direction = direction
        self.init_method: InitMethod = init_method
        self.mlp_ratio, self.dropout = mlp_ratio, dropout
        self.trainable, self.per_layer, self.parts = trainable, per_layer, tuple(parts)
        # KV heads and head dim of each side; of a teacher also how many layers are mapped.
        self.student = student = _heads("student_d_model", student_d_model, student_heads)
        self.teachers, pairs = {}, {}
        for name, config in teacher_configs.items():
            where = f"teacher_configs.{name}"
            teacher = _heads(f"{where}.d_model", config["d_model"], config.get("num_heads", 1))
            layers = config.get("num_layers")
            if per_layer and not layers:
                raise KavaError(f"{where}.num_layers={layers} with per_layer; give the layer count")
            if kind == "identity" and teacher != student:
                wide = [f"{heads * dim} ({heads} x {dim})" for heads, dim in (teacher, student)]
                raise KavaError(
                    f"projector.kind=identity: teacher {name!r} has vectors of width {wide[0]} and "
                    f"the student of {wide[1]}, KV heads x head dim; kind=linear bridges them"
                )
            self.teachers[name] = (teacher, layers)
            sides = (teacher, student) if direction == "teacher_to_student" else (student, teacher)
            widths = math.prod(sides[0]), math.prod(sides[1])
            # Keys and values never share weights.
            pairs[name] = nnx.Dict(
                {part: self._adapter(widths, layers if per_layer else None, rngs) for part in parts}
            )
        # flax refuses a plain dict of modules as an attribute, hence ``nnx.Dict``.
        self.pairs = nnx.Dict(pairs)

    def _adapter(self, widths: tuple[int, int], layers: int | None, rngs: nnx.Rngs) -> nnx.Module:
        """One adapter; with ``layers`` its weights get a leading layer axis."""
        options = {"mlp_ratio": self.mlp_ratio, "dropout": self.dropout}
        build = partial(Adapter, self.kind, widths, self.init_method, **options)
        if layers is None:
            return build(rngs)
        # A key per layer: with one key for all, every layer would start with the same weights.
        return nnx.vmap(build, in_axes=0, out_axes=0)(rngs.split(layers))

    def project_teacher_kv(
        self,
        name: str,
        k: Float[Array, "*B I"],
        v: Float[Array, "*B I"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Any:
        """Map flattened vectors [..., width in] to [..., width out]: ``(k', v')``, or ``k'`` alone.

        With ``per_layer`` the first axis runs over the mapped layers. Raises KavaError for an
        unknown teacher or a wrong width.
        """
        given = {"k": k} if v is None else {"k": k, "v": v}
        projected = self._mapped(name, given, dropout_key)
        return projected["k"] if v is None else (projected["k"], projected["v"])

    def project(
        self,
        name: str,
        vectors: Mapping[str, Float[Array, "P B T K H"]],
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> dict[str, Array]:
        """Map every part of the mapped layers into the other side's heads and width.

        Factors of products are in the narrowest dtype of the parts.
        """
        # Keys are float32 where a bias or RoPE was applied; their products would then be float32 as
        # well, and slow on accelerators. Values and outputs are in the model's dtype.
        if self.kind != "identity":
            narrow = min((x.dtype for x in vectors.values()), key=lambda dtype: dtype.itemsize)
            vectors = {part: x.astype(narrow) for part, x in vectors.items()}
        target = self.student if self.direction == "teacher_to_student" else self.teachers[name][0]
        flat = {part: x.reshape(*x.shape[:-2], -1) for part, x in vectors.items()}
        mapped = self._mapped(name, flat, dropout_key)
        return {part: x.reshape(*x.shape[:-1], *target) for part, x in mapped.items()}

    def _mapped(
        self, name: str, flat: Mapping[str, Array], dropout_key: Key[Array, ""] | None
    ) -> dict[str, Array]:
        if name not in self.pairs:
            known = ", ".join(self.pairs)
            raise KavaError(f"teacher={name!r} is unknown to the projector; it knows {known}")
        pair, count = self.pairs[name], len(self.parts)
        # A key each, or keys and values would lose the same hidden units in every step.
        keys = [None] * count if dropout_key is None else jax.random.split(dropout_key, count)
        return {
            part: self._apply(pair[part], flat[part], keys[number], name)
            for number, part in enumerate(self.parts)
            if part in flat
        }

    def _apply(self, adapter: nnx.Module, x: Array, key: Key[Array, ""] | None, name: str) -> Array:
        teacher, layers = self.teachers[name]
        source = teacher if self.direction == "teacher_to_student" else self.student
        width = math.prod(source)
        if x.shape[-1] != width or (self.per_layer and x.shape[0] != layers):
            expected = f"[{layers}, ..., {width}]" if self.per_layer else width
            raise KavaError(
                f"vectors for teacher={name!r} have shape {x.shape}, the projector was built for "
                f"{expected}; d_model is the width of the vectors passed in"
            )
        graph, weights = nnx.split(adapter)
        # On the weights and not on the result: the student learns through a frozen projector.
        if not self.trainable:
            weights = jax.lax.stop_gradient(weights)
        if not self.per_layer:
            return nnx.merge(graph, weights)(x, key)
        # ``jax.vmap`` maps over arrays only, so the weights go without their graph.
        layer_keys = None if key is None else jax.random.split(key, x.shape[0])
        return jax.vmap(lambda w, x, k: nnx.merge(graph, w)(x, k))(weights, x, layer_keys)

    def count_parameters(self) -> int:
        """Number of weights, all teachers together."""
        return sum(leaf.size for leaf in self._weights().values())

    def save(self, path: str | Path) -> None:
        """Write weights and shape to one safetensors file."""
        from safetensors.numpy import save_file

        # safetensors writes memory as it lies: in another order it would be read back scrambled.
        tensors = {
            # Names are built from paths and never parsed, so a teacher's name may hold a slash.
            "/".join(path): np.ascontiguousarray(jax.device_get(leaf))
            for path, leaf in self._weights().items()
        }
        # Metadata of safetensors can hold strings only, so the arguments go there as JSON.
        save_file(tensors, str(path), metadata={"kava_jax.projector": json.dumps(self.arguments())})

    @classmethod
    def load(cls, path: str | Path) -> "KVDimensionProjector":
        """Read what ``save`` wrote; raises KavaError when the file is not such a file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                arguments = json.loads(file.metadata()["kava_jax.projector"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            projector = cls(**arguments)
            filled = {
                path: _taken(tensors, "/".join(path), leaf.shape)
                for path, leaf in projector._weights().items()
            }
        # Metadata that is missing is None (a TypeError). Broken JSON and other shapes are
        # ValueErrors.
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise KavaError(
                f"projector={str(path)!r} is not a projector file ({error}); give one that "
                f"KVDimensionProjector.save wrote"
            ) from None
        nnx.update(projector, unflatten_dict(filled))
        return projector

    def _weights(self) -> Any:
        """Every weight by its path."""
        return flatten_dict(nnx.to_pure_dict(nnx.state(self, nnx.Param)))

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {
            "teacher_configs": {
                name: {"d_model": math.prod(heads), "num_heads": heads[0]}
                | ({"num_layers": layers} if layers else {})
                for name, (heads, layers) in self.teachers.items()
            },
            "student_d_model": math.prod(self.student),
            "student_heads": self.student[0],
            **{name: getattr(self, name) for name in _KEPT},
            "parts": list(self.parts),
        }


def _taken(tensors: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    """The tensor of that name; ValueError when it has another shape."""
    if tensors[name].shape != shape:
        raise ValueError(f"{name} has shape {tensors[name].shape} instead of {shape}")
    return jnp.asarray(tensors[name])


def _heads(field: str, width: int, heads: int) -> tuple[int, int]:
    """KV heads and head dim."""
    if heads < 1 or width < 1 or width % heads:
        raise KavaError(f"{field}={width} is not divisible by {heads} heads; check both numbers")
    return heads, width // heads
