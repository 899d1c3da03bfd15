"""What is minimised: cross-entropy, the KV loss through the projector, and optional logit KL.

One call handles one microbatch. Everything static (graphs, layer maps, weights) is bound when the
objective is built; parameters and data are arguments. The teachers' parameters are never
differentiated: gradients are taken with respect to ``params`` alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from kava_jax.alignment.attention import attention_kl
from kava_jax.alignment.controls import Control, controlled
from kava_jax.alignment.frame import Center, TokenMean, framed, measure
from kava_jax.alignment.kv_losses import KVLoss
from kava_jax.alignment.projector import Direction, KVDimensionProjector, forgets_length
from kava_jax.cache import HandedOver
from kava_jax.data.batches import Batch
from kava_jax.diagnostics import alignment
from kava_jax.geometry import Mean, masked_mean
from kava_jax.losses import cross_entropy, logit_kl, mercator
from kava_jax.models.attend import capped
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.layers import Output
from kava_jax.models.rope import Rotations
from kava_jax.models.spec import DecoderSpec
from kava_jax.training.comparison import Compared, ForwardPass, LayerComparison, forward
from kava_jax.training.handoff_term import HandoffTerm
from kava_jax.training.lm_head import Head, weighted_losses

Metrics = dict[str, Mean]
Match = Literal["cache", "attention", Output]
Parts = Literal["both", "keys", "values"]
# By ``loss.parts``, what each part of a cache counts. They add up to 1, so that ``kv_weight`` has
# one meaning whichever parts are compared.
PART_WEIGHTS: dict[Parts, dict[str, float]] = {
    "both": {"k": 0.5, "v": 0.5},
    "keys": {"k": 1.0, "v": 0.0},
    "values": {"k": 0.0, "v": 1.0},
}


class TeacherLink(NamedTuple):
    """How one teacher is tied to the student; its weights are an argument of the step."""

    graph: nnx.GraphDef[Decoder]
    comparison: LayerComparison
    spec: DecoderSpec
    weight: float = 1.0
    """Of its terms in the loss."""
    control: Control = "none"


# Running means of the frame, by teacher and part, each of student and target: what the objective
# reads from the train state, and measures for its next step. Empty when the frame keeps none.
Statistics = dict[str, dict[str, tuple[TokenMean, TokenMean]]]
# This microbatch's part of the whole batch's loss-bearing tokens, for CE and KL, and for KV.
Shares = tuple[float | Float[Array, ""], float | Float[Array, ""]]


@dataclass(frozen=True)
class Objective:
    """``ce_weight * CE + kl_weight * KL``, and KV, to which the caller gives its weight.

    KV is the sum of the compared parts' losses (of keys and values, or of the ``output`` of layers)
    with the weights in ``parts``, plus the attention KL where ``match_attention`` is set. KV and KL
    are summed over teachers, each times its weight. ``projector`` is None without teachers,
    ``kl_weight`` where teachers give no logits.
    """

    student: nnx.GraphDef[Decoder]
    projector: nnx.GraphDef[KVDimensionProjector] | None
    teachers: Mapping[str, TeacherLink]
    kv_loss: KVLoss
    center: Center
    ce_weight: optax.Schedule
    parts: Mapping[str, float]
    output: Output | None = None
    direction: Direction = "student_to_teacher"
    match_attention: bool = False
    kl_weight: optax.Schedule | None = None
    kl_temperature: float = 1.0
    handoff: HandoffTerm | None = None
    batch_shards: int = 1

    def dealt(self, key: Key[Array, ""], batch: Batch) -> tuple[Batch, Bool[Array, "B"] | None]:
        """Which rows of a batch to train on are handed over; None without a handoff."""
        return (batch, None) if self.handoff is None else self.handoff.dealt(key, batch)

    def __call__(
        self,
        params: Mapping[str, Params],
        teachers: Mapping[str, Params],
        batch: Batch,
        step: Int[Array, ""],
        shares: Shares,
        statistics: Statistics,
        dropout_key: Key[Array, ""] | None = None,
        handed_B: Bool[Array, "B"] | None = None,
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], tuple[Metrics, Statistics]]:
        """CE and KL with their weights, and KV before its weight; metrics, and new statistics.

        Both losses are this microbatch's part: those of all microbatches add up to the losses of
        the whole batch. Metrics are (sum, count), the statistics its own. Dropout is on only when
        a key is given. Without ``handed_B`` every model reads its rows alone.
        """
        queries = self.match_attention
        passes = {name: self._read(name, teachers[name], batch, queries) for name in self.teachers}
        from_teachers = from_student = None
        if self.handoff is not None and handed_B is not None:
            past = partial(self.handoff.past, params["handoff"], batch, handed_B)
            if self.handoff.reader == "teacher":
                from_teachers = partial(past, passes)
            else:
                from_student = past
        student = forward(
            self.student,
            params["student"],
            batch,
            output=self.output,
            queries=queries,
            handed=from_teachers,
        )
        kv, metrics, means = jnp.zeros(()), {}, {}
        for index, name in enumerate(self.teachers):
            # ``fold_in`` and not ``split``: the masks of one teacher do not depend on how many
            # there are.
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            of_teacher, found, means[name] = self._of_teacher(
                name, params, passes[name], student, batch, statistics.get(name), key
            )
            kv += of_teacher
            metrics |= {f"{name}/{term}": mean for term, mean in found.items()}
        # Without KL a teacher is loaded without its LM head, so it cannot be asked for logits.
        language, found = self._language(
            batch,
            student,
            passes if self.kl_weight else {},
            step,
            shares[0],
            handed_B if from_teachers else None,
        )
        if from_student is not None:
            for name in self.teachers:
                past = partial(from_student, {name: student})
                answered, found[f"{name}/ce_handed"] = self._answered(
                    name, teachers[name], batch, past, step, shares[0]
                )
                language += answered
        # No entry where the frame keeps nothing, as in the state that these are merged into.
        means = jax.lax.stop_gradient({name: own for name, own in means.items() if own})
        return (language, shares[1] * kv), (metrics | found, means)

    def compared(
        self, params: Mapping[str, Params], teachers: Mapping[str, Params], batch: Batch
    ) -> dict[str, tuple[Compared, ForwardPass, ForwardPass]]:
        """Every teacher's vectors and the student's in one space, without dropout.

        Caches come with queries.
        """
        own, result = params["student"], {}
        student = forward(self.student, own, batch, output=self.output, queries=True)
        for name, link in self.teachers.items():
            teacher = self._read(name, teachers[name], batch, queries=True)
            sides = link.comparison.sides(student, teacher)
            compared = link.comparison.projected(self._projector(params), *sides)
            result[name] = (compared, student, teacher)
        return result

    def _projector(self, params: Mapping[str, Params]) -> KVDimensionProjector:
        assert self.projector is not None
        return nnx.merge(self.projector, params["projector"])

    def _read(self, name: str, params: Params, batch: Batch, queries: bool) -> ForwardPass:
        """One teacher's forward pass, which keeps the layers that are read of it."""
        link = self.teachers[name]
        maps = [link.comparison.layer_map]
        if self.handoff is not None and self.handoff.reader == "teacher":
            maps.append(self.handoff.maps[name])
        layers = tuple(sorted({layer for one in maps for layer in one.read_layers}))
        return forward(
            link.graph, params, batch, output=self.output, queries=queries, layers=layers
        )

    def _of_teacher(
        self,
        name: str,
        params: Mapping[str, Params],
        teacher: ForwardPass,
        student: ForwardPass,
        batch: Batch,
        running: Mapping[str, tuple[TokenMean, TokenMean]] | None,
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, ""], Metrics, dict[str, tuple[TokenMean, TokenMean]]]:
        """One teacher's weighted KV loss, its metrics, and its statistics."""
        link, projector = self.teachers[name], self._projector(params)
        comparison, mask = link.comparison, batch.kv_mask
        ours, theirs = comparison.sides(student, teacher)
        aimed = comparison.projected(projector, ours, theirs, dropout_key)
        # Before a control replaces the target: what is reported is alignment with the teacher's
        # own.
        metrics = _alignment(aimed, projector, mask)
        if link.control in ("shuffled", "constant"):
            # Under the shuffled control fewer tokens have a target than count.
            theirs, mask = controlled(link.control, theirs, mask)
            aimed = comparison.projected(projector, ours, theirs, dropout_key)
        kv, of_kv, means = self._kv(aimed, mask, running)
        metrics |= of_kv
        if self.match_attention:
            read = comparison.attended(aimed, self.direction, student, teacher)
            # In the student's space these queries are its own. With a gradient they could lower the
            # loss where the keys should.
            queries = jax.lax.stop_gradient(read.queries)
            attention = attention_kl(read._replace(queries=queries), mask)
            kv = kv + attention
            metrics["attention_kl"] = masked_mean(attention, mask)
        # Each teacher's mean is over its own targets.
        return link.weight * masked_mean(kv, mask).value, metrics, means

    def _language(
        self,
        batch: Batch,
        student: ForwardPass,
        teachers: Mapping[str, ForwardPass],
        step: Int[Array, ""],
        share: float | Float[Array, ""],
        handed_B: Bool[Array, "B"] | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Weighted cross-entropy, and KL to every teacher that is given; their means as metrics.

        Rows whose prompt was handed over count with the handoff's weight.
        """
        mask_BU = batch.loss_mask[:, 1:]
        weights = [self.ce_weight(step)]
        if self.kl_weight:
            weights += [self.kl_weight(step) * self.teachers[name].weight for name in teachers]
        weights_K = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
        of_mean = _of_mean(mask_BU, share)
        if handed_B is not None:
            assert self.handoff is not None
            of_mean *= jnp.where(handed_B, self.handoff.weight(step), 1.0)[:, None]
        weights_BUK = of_mean[..., None] * weights_K.reshape(1, 1, -1)
        total, losses_BUK = self._predicted(student, teachers, batch, weights_BUK)
        names = ["ce", *(f"{name}/kl" for name in teachers)]
        metrics = {
            name: masked_mean(losses_BUK[..., index], mask_BU) for index, name in enumerate(names)
        }
        if handed_B is not None:
            handed_BU = mask_BU & handed_B[:, None]
            metrics["ce_handed"] = masked_mean(losses_BUK[..., 0], handed_BU)
        return total, metrics

    def _answered(
        self,
        name: str,
        params: Params,
        batch: Batch,
        handed: Callable[[Rotations], HandedOver],
        step: Int[Array, ""],
        share: float | Float[Array, ""],
    ) -> tuple[Float[Array, ""], Mean]:
        """Weighted cross-entropy of a teacher that goes on from the student's cache; its mean."""
        assert self.handoff is not None
        link, mask_BU = self.teachers[name], batch.loss_mask[:, 1:]
        run = forward(link.graph, params, batch, handed=handed)
        weights_BU = _of_mean(mask_BU, share) * self.handoff.weight(step) * link.weight
        weights_BU1 = weights_BU[..., None]
        total, losses_BU1 = self._predicted(run, {}, batch, weights_BU1, table_learns=False)
        return total, masked_mean(losses_BU1[..., 0], mask_BU)

    def _predicted(
        self,
        run: ForwardPass,
        teachers: Mapping[str, ForwardPass],
        batch: Batch,
        weights_BUK: Float[Array, "B U K"],
        table_learns: bool = True,
    ) -> tuple[Float[Array, ""], Float[Array, "B U K"]]:
        """``weighted_losses``: cross-entropy of one model, and its KL to every teacher given."""

        def losses(logits: dict[str, Array], labels: Array) -> Array:
            caps = {name: one.model.spec.logit_cap for name, one in teachers.items()}
            own = capped(logits["student"], run.model.spec.logit_cap)
            divergences = [
                _divergence(own, capped(logits[name], cap), self.kl_temperature)
                for name, cap in caps.items()
            ]
            return jnp.stack([_cross_entropy(own, labels), *divergences], axis=-1)

        return weighted_losses(
            _head(run),
            {name: _head(teacher) for name, teacher in teachers.items()},
            batch.tokens[:, 1:],
            batch.loss_mask[:, 1:],
            weights_BUK,
            losses,
            shards=self.batch_shards,
            layouts=run.model.layouts,
            table_learns=table_learns,
        )

    def _kv(
        self,
        aimed: Compared,
        mask_BT: Bool[Array, "B T"],
        running: Mapping[str, tuple[TokenMean, TokenMean]] | None,
    ) -> tuple[Float[Array, "B T"], Metrics, dict[str, tuple[TokenMean, TokenMean]]]:
        """Loss of every token, summed over parts with their weights; each as a metric; means.

        Tokens outside of ``mask_BT`` have no target.
        """
        tokens, metrics, means = jnp.zeros(mask_BT.shape), {}, {}
        for part, weight in self.parts.items():
            sides = [side[part] for side in aimed[:2]]
            known = running[part] if running else (None, None)
            student, target = (
                framed(side, mask_BT, self.center, mean)
                for side, mean in zip(sides, known, strict=True)
            )
            # Also of a part whose weight is 0, because its loss is still reported.
            losses = self.kv_loss(student, target, mask_BT)
            tokens = tokens + weight * losses
            metrics[f"kv_{part}"] = masked_mean(losses, mask_BT)
            if running:
                # The sides are measured as they were before the frame took its means off.
                s, t = jax.lax.stop_gradient(sides)
                means[part] = measure(s, mask_BT), measure(t, mask_BT)
        return tokens, metrics, means


def _of_mean(mask_BU: Bool[Array, "B U"], share: float | Float[Array, ""]) -> Array:
    """What each token counts in this microbatch's part of the batch's mean."""
    return mask_BU / jnp.maximum(mask_BU.sum(), 1) * share


def _head(run: ForwardPass) -> Head:
    """Of next-token predictions: the last position predicts nothing."""
    return run.hidden[:, :-1], run.model.head_table()


def _cross_entropy(logits: Array, labels: Array) -> Array:
    # ``cross_entropy`` gives a mean over whatever it gets; token by token that is each one's loss.
    return jax.vmap(jax.vmap(lambda row, label: cross_entropy(row, label).value))(logits, labels)


def _divergence(student: Array, teacher: Array, temperature: float) -> Array:
    of_token = partial(logit_kl, temperature=temperature)
    return jax.vmap(jax.vmap(lambda s, t: of_token(s, t).value))(student, teacher)


def _alignment(
    compared: Compared, projector: KVDimensionProjector, mask_BT: Bool[Array, "B T"]
) -> Metrics:
    """Cosines and magnitudes of every part, all layers together; no gradient."""
    metrics = {}
    for part in compared[0]:
        s, t, own = (jax.lax.stop_gradient(side[part]) for side in compared)
        # Otherwise these are lengths that the projector made, and say nothing of the student's.
        if not forgets_length(projector.kind, projector.direction):
            metrics[f"mag_loss_{part}"] = mercator(s, t, mask_BT, alpha=0.0, beta=1.0)
        for name, mean in alignment(s, t, mask_BT, own).items():
            metrics[f"{name}_{part}"] = jax.tree.map(jnp.sum, mean)
    return metrics
