"""What is minimised: cross-entropy, the KV loss through the projector, and optional logit KL.

One call handles one microbatch. Everything static (graphs, layer maps, weights) is bound when the
objective is built; parameters and data are arguments. The teachers' parameters are never
differentiated: gradients are taken with respect to ``params`` alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import KVCache
from kava_jax.data.batches import Batch
from kava_jax.diagnostics import alignment
from kava_jax.geometry import Mean
from kava_jax.losses import cross_entropy, hybrid, logit_kl, mercator, mse, smooth_l1
from kava_jax.models.decoder import Decoder, KeySpace, Params
from kava_jax.models.masks import attention_mask, token_positions

Metrics = dict[str, Mean]
KVLoss = Callable[[Array, Array, Array, Array], Mean]
# Logits of one chunk of cross-entropy, per shard of the batch: 2**25 float32 are 128 MiB.
CHUNK_LOGITS = 2**25


class TeacherLink(NamedTuple):
    """How one teacher is tied to the student; its weights are an argument of the step."""

    graph: nnx.GraphDef[Decoder]
    layer_map: LayerMap
    weight: float


class Share(NamedTuple):
    """This microbatch's part of the whole batch's loss-bearing tokens, for CE/KL and for KV."""

    targets: Float[Array, ""]
    kv: Float[Array, ""]


def kv_loss(
    kind: str,
    *,
    alpha: float = 1.0,
    beta: float = 0.01,
    mercator_weight: optax.Schedule | float = 0.8,
    mse_weight: optax.Schedule | float = 0.2,
) -> KVLoss:
    """The named loss as ``(student, target, mask, step) -> Mean``; weights may be schedules."""

    def at(weight: optax.Schedule | float, step: Array) -> Any:
        return weight(step) if callable(weight) else weight

    table: dict[str, KVLoss] = {
        "mercator": lambda s, t, mask, step: mercator(s, t, mask, alpha=alpha, beta=beta),
        "mse": lambda s, t, mask, step: mse(s, t, mask),
        "smooth_l1": lambda s, t, mask, step: smooth_l1(s, t, mask),
        "hybrid": lambda s, t, mask, step: hybrid(
            s,
            t,
            mask,
            mercator_weight=at(mercator_weight, step),
            mse_weight=at(mse_weight, step),
            alpha=alpha,
            beta=beta,
        ),
    }
    return table[kind]


@dataclass(frozen=True)
class Objective:
    """``ce_weight * CE + kl_weight * KL + kv_weight(step) * (KV of keys + KV of values) / 2``.

    KV and KL are sums over teachers, each times its weight. ``projector`` is None without teachers.
    """

    student: nnx.GraphDef[Decoder]
    projector: nnx.GraphDef[KVDimensionProjector] | None
    teachers: Mapping[str, TeacherLink]
    kv_loss: KVLoss
    kv_weight: optax.Schedule
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    kl_temperature: float = 1.0
    key_space: KeySpace = "pre_rope"
    batch_shards: int = 1

    def __call__(
        self,
        params: Mapping[str, Params],
        teachers: Mapping[str, Params],
        batch: Batch,
        step: Int[Array, ""],
        share: Share,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """This microbatch's part of the loss, and its metrics as (sum, count).

        Parts of all microbatches add up to the loss of the whole batch. Dropout is on only when a
        key is given.
        """
        student, hidden_BTD, cache = self._run(self.student, params["student"], batch)
        ce = self._over_vocabulary(batch, {"student": (student, hidden_BTD)}, _ce_of_chunk)
        loss, metrics = self.ce_weight * share.targets * ce.value, {"ce": ce}
        for index, (name, link) in enumerate(self.teachers.items()):
            teacher, teacher_hidden, teacher_cache = self._run(link.graph, teachers[name], batch)
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            aligned = self._aligned(name, link, params["projector"], cache, teacher_cache, key)
            terms = self._kv_terms(*aligned, batch.kv_mask, step)
            kv = (terms["kv_k"].value + terms["kv_v"].value) / 2
            loss = loss + link.weight * self.kv_weight(step) * share.kv * kv
            if self.kl_weight > 0:
                models = {"student": (student, hidden_BTD), "teacher": (teacher, teacher_hidden)}
                terms["kl"] = self._over_vocabulary(batch, models, self._kl_of_chunk)
                loss = loss + link.weight * self.kl_weight * share.targets * terms["kl"].value
            metrics |= {f"{name}/{term}": mean for term, mean in terms.items()}
        return loss, metrics

    def _run(
        self, graph: nnx.GraphDef[Decoder], params: Params, batch: Batch
    ) -> tuple[Decoder, Float[Array, "B T D"], KVCache]:
        """A forward pass over the batch: the merged model, its hidden states and its cache."""
        model = nnx.merge(graph, params)
        positions_BT = token_positions(batch.valid)
        window = model.spec.sliding_window
        mask = attention_mask(positions_BT, positions_BT, batch.valid, window)
        return model, *model(batch.tokens, positions_BT, mask, key_space=self.key_space)

    def _aligned(
        self,
        name: str,
        link: TeacherLink,
        projector_params: Params,
        student_cache: KVCache,
        teacher_cache: KVCache,
        key: Key[Array, ""] | None,
    ) -> tuple[KVCache, KVCache]:
        """The mapped layers of both sides in one space: (student's, target's) [P, B, T, K, H]."""
        student = _take_layers(student_cache, link.layer_map.student_layers)
        teacher = _take_layers(teacher_cache, link.layer_map.teacher_layers)
        assert self.projector is not None
        projector: KVDimensionProjector = nnx.merge(self.projector, projector_params)
        if projector.direction == "student_to_teacher":
            return projector.project(name, student, dropout_key=key), teacher
        return student, projector.project(name, teacher, dropout_key=key)

    def _kv_terms(
        self, student: KVCache, target: KVCache, mask_BT: Bool[Array, "B T"], step: Array
    ) -> Metrics:
        """The loss and the alignment of keys and of values."""
        metrics = {}
        for part in ("k", "v"):
            s, t = getattr(student, part), getattr(target, part)
            measured = alignment(jax.lax.stop_gradient(s), jax.lax.stop_gradient(t), mask_BT)
            metrics |= {
                f"kv_{part}": self.kv_loss(s, t, mask_BT, step),
                f"mag_loss_{part}": mercator(s, t, mask_BT, alpha=0.0, beta=1.0),
                **{f"{field}_{part}": mean for field, mean in measured._asdict().items()},
            }
        return metrics

    def _kl_of_chunk(self, logits: dict[str, Array], labels: Array, mask: Array) -> Mean:
        del labels
        temperature = self.kl_temperature
        return logit_kl(logits["student"], logits["teacher"], mask, temperature=temperature)

    def _over_vocabulary(
        self,
        batch: Batch,
        models: dict[str, tuple[Decoder, Float[Array, "B T D"]]],
        loss_of_chunk: Callable[[dict[str, Array], Array, Array], Mean],
    ) -> Mean:
        """Sum a loss on logits over chunks of tokens, so that [B, T, V] never exists at once.

        The token at t predicts the one at t + 1; ``loss_mask`` marks the predicted tokens.
        """
        rows, length = batch.tokens.shape
        vocabulary = max(model.spec.vocab_size for model, _ in models.values())
        budget = CHUNK_LOGITS * self.batch_shards // (rows * vocabulary)
        chunks = math.ceil((length - 1) / max(1, budget))

        def term(inputs: tuple[dict[str, Array], Array, Array]) -> Mean:
            hiddens, labels, mask = inputs
            logits = {name: models[name][0].logits(hidden) for name, hidden in hiddens.items()}
            return loss_of_chunk(logits, labels, mask)

        hiddens = {name: hidden[:, :-1] for name, (_, hidden) in models.items()}
        inputs = (hiddens, batch.tokens[:, 1:], batch.loss_mask[:, 1:])
        if chunks == 1:
            return term(inputs)
        means = jax.lax.map(jax.checkpoint(term), jax.tree.map(lambda x: _split(x, chunks), inputs))
        return Mean(means.sum.sum(), means.count.sum())


def _ce_of_chunk(logits: dict[str, Array], labels: Array, mask: Array) -> Mean:
    return cross_entropy(logits["student"], labels, mask)


def _split(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...], zero-padded (and so masked) at the end."""
    size = math.ceil(x.shape[1] / chunks)
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, size * chunks - x.shape[1])
    padded = jnp.pad(x, pad).reshape(x.shape[0], chunks, size, *x.shape[2:])
    return jnp.moveaxis(padded, 1, 0)


def _take_layers(cache: KVCache, layers: tuple[int, ...]) -> KVCache:
    """The given layers of a cache; the cache itself when that is all of them in order."""
    if layers == tuple(range(cache.k.shape[0])):
        return cache
    return jax.tree.map(lambda array: array[np.array(layers)], cache)
