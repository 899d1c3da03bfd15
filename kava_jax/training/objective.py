"""What is minimised: cross-entropy, the KV loss through the projector, and optional logit KL.

One call handles one microbatch. Everything static (graphs, layer maps, weights) is bound when the
objective is built; parameters and data are arguments. The teachers' parameters are never
differentiated: gradients are taken with respect to ``params`` alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from kava_jax.alignment.attention import attention_kl
from kava_jax.alignment.controls import Control, controlled
from kava_jax.alignment.frame import Frame, TokenMean, measure
from kava_jax.alignment.kv_losses import KVLoss
from kava_jax.alignment.projector import Direction, KVDimensionProjector
from kava_jax.data.batches import Batch
from kava_jax.diagnostics import alignment
from kava_jax.geometry import Mean, masked_mean
from kava_jax.losses import cross_entropy, logit_kl, mercator
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.spec import DecoderSpec
from kava_jax.training.comparison import Compared, Comparison, Reading, read
from kava_jax.training.lm_head import Head, weighted_losses

Metrics = dict[str, Mean]
Match = Literal["cache", "attention"]
Parts = Literal["both", "keys", "values"]
PARTS = ("k", "v")
PART_WEIGHTS = {
    "both": {"k": 0.5, "v": 0.5},
    "keys": {"k": 1.0, "v": 0.0},
    "values": {"k": 0.0, "v": 1.0},
}


class TeacherLink(NamedTuple):
    """How one teacher is tied to the student; its weights are an argument of the step."""

    graph: nnx.GraphDef[Decoder]
    comparison: Comparison
    spec: DecoderSpec
    weight: float = 1.0
    """Of its terms in the loss."""
    control: Control = "none"


class Share(NamedTuple):
    """This microbatch's part of the whole batch's loss-bearing tokens, for CE/KL and for KV."""

    targets: Float[Array, ""]
    kv: Float[Array, ""]


class SideMeans(NamedTuple):
    """The running mean of one part (keys or values) of both sides."""

    student: TokenMean
    target: TokenMean


# Running means of the frame, by teacher and part: what the objective reads from the train state,
# and measures for its next step. Empty when the frame keeps none.
Statistics = dict[str, dict[str, SideMeans]]


class Losses(NamedTuple):
    """CE and KL with their weights, and KV before its weight."""

    language: Float[Array, ""]
    kv: Float[Array, ""]


class _OfTeacher(NamedTuple):
    """One teacher's pass, its KV loss token by token, its metrics, and its statistics."""

    reading: Reading
    kv: Float[Array, "B T"]
    mask: Bool[Array, "B T"]
    """The tokens that have a target: fewer than count under the shuffled control."""
    metrics: Metrics
    means: dict[str, SideMeans]


@dataclass(frozen=True)
class Objective:
    """``ce_weight * CE + kl_weight * KL``, and KV, to which the caller gives its weight.

    KV is the mean of keys' and values' losses, or one of them (``parts``), plus
    ``attention_weight`` times the attention KL. KV and KL are summed over teachers, each times its
    weight. ``projector`` is None without teachers.
    """

    student: nnx.GraphDef[Decoder]
    projector: nnx.GraphDef[KVDimensionProjector] | None
    teachers: Mapping[str, TeacherLink]
    kv_loss: KVLoss
    frame: Frame
    ce_weight: optax.Schedule
    parts: Parts = "both"
    direction: Direction = "student_to_teacher"
    attention_weight: float = 0.0
    kl_weight: float = 0.0
    kl_temperature: float = 1.0
    batch_shards: int = 1

    def __call__(
        self,
        params: Mapping[str, Params],
        teachers: Mapping[str, Params],
        batch: Batch,
        step: Int[Array, ""],
        share: Share,
        statistics: Statistics,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Losses, tuple[Metrics, Statistics]]:
        """This microbatch's part of the losses; its metrics as (sum, count), its own statistics.

        Parts of all microbatches add up to the losses of the whole batch. Dropout is on only when a
        key is given.
        """
        student = self._read(self.student, params["student"], batch)
        if not self.teachers:
            language, metrics = self._language(batch, student, {}, step, share)
            return Losses(language, jnp.zeros(())), (metrics, {})
        found, metrics = {}, {}
        for index, name in enumerate(self.teachers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            running = statistics.get(name)
            found[name] = self._of_teacher(
                name, params, teachers[name], student, batch, step, running, key
            )
            metrics |= {f"{name}/{term}": mean for term, mean in found[name].metrics.items()}
        # Each teacher's mean is over its own targets.
        kv = sum(
            self.teachers[name].weight * masked_mean(one.kv, one.mask).value
            for name, one in found.items()
        )
        readings = {name: one.reading for name, one in found.items()} if self.kl_weight > 0 else {}
        language, of_language = self._language(batch, student, readings, step, share)
        new = {name: one.means for name, one in found.items() if one.means}
        losses = Losses(language, share.kv * kv)
        return losses, (metrics | of_language, jax.lax.stop_gradient(new))

    def compared(
        self, params: Mapping[str, Params], teachers: Mapping[str, Params], batch: Batch
    ) -> dict[str, tuple[Compared, Reading, Reading]]:
        """Every teacher's cache and the student's in one space, with queries, without dropout."""
        student = self._read(self.student, params["student"], batch, queries=True)
        result = {}
        for name, link in self.teachers.items():
            teacher = self._read(link.graph, teachers[name], batch, queries=True)
            compared = link.comparison(self._projector(params), student, teacher)
            result[name] = (compared, student, teacher)
        return result

    def _read(
        self,
        graph: nnx.GraphDef[Decoder],
        params: Params,
        batch: Batch,
        *,
        queries: bool | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> Reading:
        queries = self.attention_weight > 0 if queries is None else queries
        return read(graph, params, batch, queries=queries, layers=layers)

    def _projector(self, params: Mapping[str, Params]) -> KVDimensionProjector:
        assert self.projector is not None
        return nnx.merge(self.projector, params["projector"])

    def _of_teacher(
        self,
        name: str,
        params: Mapping[str, Params],
        teacher_params: Params,
        student: Reading,
        batch: Batch,
        step: Int[Array, ""],
        running: Mapping[str, SideMeans] | None,
        dropout_key: Key[Array, ""] | None,
    ) -> _OfTeacher:
        """One teacher's part in the losses."""
        link, projector = self.teachers[name], self._projector(params)
        needed = link.comparison.layer_map.read_layers
        teacher = self._read(link.graph, teacher_params, batch, layers=needed)
        ours, theirs = link.comparison.sides(student, teacher)
        compared = link.comparison.projected(projector, ours, theirs, dropout_key)
        aimed, mask = compared, batch.kv_mask
        if link.control in ("shuffled", "constant"):
            theirs, mask = controlled(link.control, theirs, mask)
            aimed = link.comparison.projected(projector, ours, theirs, dropout_key)
        kv, metrics, means = self._kv(aimed, mask, batch, step, running)
        metrics |= _alignment(compared, projector, batch.kv_mask)
        if self.attention_weight > 0:
            attended = link.comparison.attended(aimed, self.direction, student, teacher)
            attention = attention_kl(
                jax.lax.stop_gradient(attended.queries),
                attended.student.k,
                attended.target.k,
                attended.mask,
                mask,
            )
            kv = kv + self.attention_weight * attention
            metrics["attention_kl"] = masked_mean(attention, mask)
        return _OfTeacher(teacher, kv, mask, metrics, means)

    def _language(
        self,
        batch: Batch,
        student: Reading,
        teachers: Mapping[str, Reading],
        step: Int[Array, ""],
        share: Share,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Weighted cross-entropy, and KL to every teacher that is given; their means as metrics."""
        mask_BU = batch.loss_mask[:, 1:]
        of_mean = mask_BU / jnp.maximum(mask_BU.sum(), 1) * share.targets
        weights_BUK = (jnp.asarray(self.ce_weight(step)) * of_mean)[..., None]
        if teachers:
            weights = jnp.asarray([self.teachers[name].weight for name in teachers])
            of_kl = self.kl_weight * of_mean[..., None] * weights.reshape(1, 1, -1)
            weights_BUK = jnp.concatenate([weights_BUK, of_kl], axis=-1)

        def losses(logits: dict[str, Array], labels: Array) -> Array:
            divergences = [self._divergence(logits["student"], logits[name]) for name in teachers]
            return jnp.stack([_cross_entropy(logits["student"], labels), *divergences], axis=-1)

        total, losses_BUK = weighted_losses(
            _head(student),
            {name: _head(reading) for name, reading in teachers.items()},
            batch.tokens[:, 1:],
            mask_BU,
            weights_BUK,
            losses,
            shards=self.batch_shards,
            layouts=student.model.layouts,
        )
        names = ["ce", *(f"{name}/kl" for name in teachers)]
        metrics = {
            name: masked_mean(losses_BUK[..., index], mask_BU) for index, name in enumerate(names)
        }
        return total, metrics

    def _kv(
        self,
        aimed: Compared,
        mask_BT: Bool[Array, "B T"],
        batch: Batch,
        step: Int[Array, ""],
        running: Mapping[str, SideMeans] | None,
    ) -> tuple[Float[Array, "B T"], Metrics, dict[str, SideMeans]]:
        """Loss of every token, the mean of keys' and values'; both as metrics; means.

        Tokens outside of ``mask_BT`` have no target.
        """
        tokens, metrics, means = jnp.zeros(batch.tokens.shape), {}, {}
        for part in PARTS:
            sides: list[Array] = [getattr(side, part) for side in (aimed.student, aimed.target)]
            known = running[part] if running else (None, None)
            framed_s, framed_t = (
                self.frame(side, mask_BT, memory) for side, memory in zip(sides, known, strict=True)
            )
            losses = self.kv_loss(framed_s, framed_t, mask_BT)
            losses = jnp.where(mask_BT, losses, 0.0)
            tokens = tokens + PART_WEIGHTS[self.parts][part] * losses
            metrics[f"kv_{part}"] = masked_mean(losses, mask_BT)
            if running:
                s, t = jax.lax.stop_gradient(sides)
                means[part] = SideMeans(measure(s, mask_BT), measure(t, mask_BT))
        return tokens, metrics, means

    def _divergence(self, student: Array, teacher: Array) -> Array:
        def of_token(student: Array, teacher: Array) -> Array:
            return logit_kl(student, teacher, temperature=self.kl_temperature).value

        return jax.vmap(jax.vmap(of_token))(student, teacher)


def _head(reading: Reading) -> Head:
    """Of next-token predictions: the last position predicts nothing."""
    return Head(reading.hidden[:, :-1], reading.model.head_table())


def _cross_entropy(student: Array, labels: Array) -> Array:
    def of_token(row: Array, label: Array) -> Array:
        return cross_entropy(row, label).value

    return jax.vmap(jax.vmap(of_token))(student, labels)


def _alignment(
    compared: Compared, projector: KVDimensionProjector, mask_BT: Bool[Array, "B T"]
) -> Metrics:
    """Cosines and magnitudes of keys and values, all layers together; no gradient."""
    metrics = {}
    for part in PARTS:
        s, t, own = (jax.lax.stop_gradient(getattr(side, part)) for side in compared)
        if not projector.forgets_length:
            metrics[f"mag_loss_{part}"] = mercator(s, t, mask_BT, alpha=0.0, beta=1.0)
        measured = alignment(s, t, mask_BT, own)
        metrics |= {f"{field}_{part}": _whole(mean) for field, mean in measured._asdict().items()}
    return metrics


def _whole(mean: Mean) -> Mean:
    """All layers together."""
    return Mean(mean.sum.sum(), mean.count.sum())
