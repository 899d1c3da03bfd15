"""Losses between vectors and between distributions, and the original method's loss callables.

Pure functions return a ``Mean`` (sum, count), float32 inside whatever comes in. Callables return
``(loss, metrics)``, the three-line form of the original method. None of them stops a gradient: the
caller decides what is a constant (usually the teacher). Vectors and rows that the mask leaves out
may hold NaN and change neither value nor gradient. ``*_values`` are the formulas alone: float32
vectors in, one number per vector out.

Left out on purpose: choosing layers, projecting, weighting terms (``alignment``, ``training``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.geometry import Mean, compare, cosine, masked_mean

# The original method's figure, so that its losses come out the same.
EPS = 1e-8  # keeps the logarithm of a zero length finite

# int by name: the runtime check of the tests does not take an int for a float.
Scalar = float | int | Float[Array, ""]
Weight = float | int | Callable[..., float | Array]
KV = KVCache | tuple[Array, Array] | Array
Metrics = dict[str, Array]


def mercator(
    student: Float[Array, "*B H"],
    target: Float[Array, "*C G"],
    mask: Shaped[Array, "..."] | None = None,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 0.0,
) -> Mean:
    """The angle between student and target, blind to length unless beta is above 0.

    Mean over vectors of ``alpha * (1 - cos) + beta * (log(|s| + eps) - log(|t| + eps))^2`` with
    eps = 1e-8. Zero, huge (1e30) and tiny (1e-30) vectors give a finite value and gradient. The
    caller stops the gradient of whichever side is constant.

    Args:
        student, target: vectors of one shape.
        mask: not zero where a vector counts: the rank of the leading axes, size 1 broadcasts; or
            [B, T] for caches [L, B, T, K, H].
        alpha, beta: weights of direction and of magnitude.

    Raises:
        KavaError: the two shapes differ, or the mask fits neither form.
    """
    # Not ``comparable``: it would write both caches once more, in float32. ``compare`` needs no
    # copy.
    keep = vector_mask(student, target, mask)
    return masked_mean(mercator_values(student, target, alpha, beta, keep), keep)


def mercator_values(
    s: Float[Array, "*B H"],
    t: Float[Array, "*B H"],
    alpha: Scalar = 1.0,
    beta: Scalar = 0.0,
    keep: Bool[Array, "*B"] | None = None,
) -> Float[Array, "*B"]:
    """``alpha * (1 - cos) + beta * (log(|s| + eps) - log(|t| + eps))^2`` of each vector.

    Vectors that ``keep`` leaves out may hold NaN: they give any number, and get no gradient.
    """
    cos, s_length, t_length = compare(s, t, keep)
    return _weighted(1.0 - cos, _log_ratio_squared(s_length, t_length), alpha, beta)


def _weighted(direction: Array, magnitude: Array, alpha: Scalar, beta: Scalar) -> Array:
    # A weight of 0 costs nothing in the backward pass only if its term is left out.
    # Under jit only a plain number can be tested; a traced beta has no value yet.
    if isinstance(beta, float | int) and beta == 0:
        return alpha * direction
    return alpha * direction + beta * magnitude


def _log_ratio_squared(
    s_length: Float[Array, "*B"], t_length: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    # A difference, because the ratio itself can overflow: 1e31 over a zero length's 1e-8.
    return (jnp.log(s_length + EPS) - jnp.log(t_length + EPS)) ** 2


def mse(
    student: Float[Array, "*B H"],
    target: Float[Array, "*C G"],
    mask: Shaped[Array, "..."] | None = None,
) -> Mean:
    """Mean over vectors of ``mean((s - t)^2)`` over the last axis; masks, errors as ``mercator``.

    Unlike Mercator it overflows in float32 where entries pass about 1e19.
    """
    s, t, keep = comparable(student, target, mask)
    return masked_mean(mse_values(s, t), keep)


def mse_values(s: Float[Array, "*B H"], t: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """``mean((s - t)^2)`` of each vector."""
    return jnp.mean((s - t) ** 2, axis=-1)


def cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Int[Array, "*B"],
    mask: Shaped[Array, "..."] | None = None,
) -> Mean:
    """Mean over counted positions of ``logsumexp(logits) - logits[label]``, over all V rows.

    Labels are not shifted here: ``labels[i]`` is the id that ``logits[i]`` predicts. Where the mask
    is 0 a label may be anything (-100 for instance). The mask has the labels' rank.
    """
    keep = _keep(mask, labels.shape)
    rows = _counted(logits, keep)
    # A label like -100 names no entry of a short row: the gather would fill in NaN.
    safe_labels = labels if keep is None else jnp.where(keep, labels, 0)
    picked = _entries(rows, safe_labels)
    return masked_mean(jax.nn.logsumexp(rows, axis=-1) - picked, keep)


@jax.custom_vjp
def _entries(rows: Float[Array, "*B V"], index: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """``rows[..., index]``. Its gradient is a comparison, which is fused into whatever reads it.

    A gather's own gradient is scattered into zeros: of logits that is one more array of their size.
    """
    return jnp.take_along_axis(rows, index[..., None], axis=-1)[..., 0]


def _entries_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, None]:
    rows, index = saved
    here = jax.lax.broadcasted_iota(index.dtype, rows.shape, rows.ndim - 1) == index[..., None]
    return jnp.where(here, slope[..., None], 0.0), None


_entries.defvjp(lambda rows, index: (_entries(rows, index), (rows, index)), _entries_backward)


def logit_kl(
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B Vt"],
    mask: Shaped[Array, "..."] | None = None,
    *,
    temperature: Scalar = 1.0,
) -> Mean:
    """Mean over counted positions of ``T^2 * KL(teacher || student)`` at temperature T.

    Both distributions are renormalised over the ids that both vocabularies have (the smaller
    width), so rows of padding on either side have no part in it. T^2 keeps the gradient's scale
    (Hinton et al. 2015, section 2.1). The caller stops the teacher's gradient.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    keep = _keep(mask, student_logits.shape[:-1])
    student, teacher = (
        jax.nn.log_softmax(_counted(logits[..., :shared], keep) / temperature, axis=-1)
        for logits in (student_logits, teacher_logits)
    )
    # Both sides as logarithms: a probability that vanishes in float32 has no finite logarithm.
    divergence = optax.losses.kl_divergence_with_log_targets(student, teacher)
    return masked_mean(temperature**2 * divergence, keep)


def alignment_accuracy(
    student: Float[Array, "*B H"],
    teacher: Float[Array, "*C G"],
    mask: Shaped[Array, "..."] | None = None,
    threshold: float = 0.95,
) -> Float[Array, ""]:
    """Percent of counted vectors whose cosine is at least ``threshold``; masks as ``mercator``."""
    s, t, keep = comparable(student, teacher, mask)
    return 100.0 * masked_mean((cosine(s, t) >= threshold).astype(jnp.float32), keep).value


# Frozen and so hashable: a loss can be a static argument of jit.
@dataclass(frozen=True)
class MercatorKVLoss:
    """The original method's loss: ``loss, metrics = MercatorKVLoss()(student_kv, teacher_kv)``.

    ``student_kv`` and ``teacher_kv`` are each one array [..., D], or a KVCache or (k, v) pair: then
    loss and metrics are the mean of K's and V's, each divided by its own count. Mask and errors as
    ``mercator``. Metrics: ``loss, cos_sim, dir_loss, mag_loss, s_magnitude, t_magnitude,
    mag_ratio`` (= mean|s| / mean|t|), float32 scalars. The caller stops gradients.
    """

    alpha: float | int = 1.0
    beta: float | int = 0.0

    def __call__(
        self, student_kv: KV, teacher_kv: KV, mask: Shaped[Array, "..."] | None = None
    ) -> tuple[Array, Metrics]:
        """The loss, a float32 scalar, and the metrics."""

        def one(student: Array, teacher: Array) -> Metrics:
            metrics = _sphere_metrics(student, teacher, mask)
            terms = metrics["dir_loss"], metrics["mag_loss"]
            return {"loss": _weighted(*terms, self.alpha, self.beta)} | metrics

        return _over_pair(one, student_kv, teacher_kv)


@dataclass(frozen=True)
class HybridKVLoss:
    """``mercator_weight * Mercator(1, beta) + mse_weight * MSE``; arguments as MercatorKVLoss.

    Each weight is a number or a schedule ``step -> weight`` (any optax schedule); with a schedule,
    pass ``step``. Adds the metrics ``mercator_loss, mse_loss, mercator_weight, mse_weight``.
    """

    mercator_weight: Weight = 0.8
    mse_weight: Weight = 0.2
    beta: float | int = 0.01

    def __call__(
        self,
        student_kv: KV,
        teacher_kv: KV,
        mask: Shaped[Array, "..."] | None = None,
        step: int | Int[Array, ""] | None = None,
    ) -> tuple[Array, Metrics]:
        """The loss, a float32 scalar, and the metrics."""
        weights = {
            name: _weight_at(f"HybridKVLoss.{name}", getattr(self, name), step)
            for name in ("mercator_weight", "mse_weight")
        }

        def one(student: Array, teacher: Array) -> Metrics:
            metrics = _sphere_metrics(student, teacher, mask)
            direction = _weighted(metrics["dir_loss"], metrics["mag_loss"], 1.0, self.beta)
            value = mse(student, teacher, mask).value
            loss = weights["mercator_weight"] * direction + weights["mse_weight"] * value
            terms = {"loss": loss, "mercator_loss": direction, "mse_loss": value}
            return terms | weights | metrics

        return _over_pair(one, student_kv, teacher_kv)


def _weight_at(field: str, weight: Weight, step: int | Array | None) -> Array:
    """The weight as a float32 scalar; a schedule is asked for its value at ``step``."""
    if not callable(weight):
        return jnp.asarray(weight, jnp.float32)
    if step is None:
        raise KavaError(f"{field} is a schedule and step=None; pass step=<the training step>")
    return jnp.asarray(weight(step), jnp.float32)


def _over_pair(
    one: Callable[[Array, Array], Metrics], student_kv: KV, teacher_kv: KV
) -> tuple[Array, Metrics]:
    """The loss and metrics of one array, or the mean of K's and V's."""
    if isinstance(student_kv, tuple) and isinstance(teacher_kv, tuple):
        k, v = (one(s, t) for s, t in zip(student_kv, teacher_kv, strict=True))
        metrics = jax.tree.map(lambda a, b: 0.5 * (a + b), k, v)
    elif isinstance(student_kv, tuple) or isinstance(teacher_kv, tuple):
        kinds = f"{type(student_kv).__name__} and {type(teacher_kv).__name__}"
        raise KavaError(f"student_kv and teacher_kv are {kinds}; pass two arrays or two (k, v)")
    else:
        metrics = one(student_kv, teacher_kv)
    return metrics["loss"], metrics


def _sphere_metrics(student: Array, teacher: Array, mask: Array | None) -> Metrics:
    """What every KV loss reports apart from itself."""
    keep = vector_mask(student, teacher, mask)
    cos, s_length, t_length = compare(student, teacher, keep)
    values = {
        "cos_sim": cos,
        "dir_loss": 1.0 - cos,
        "mag_loss": _log_ratio_squared(s_length, t_length),
        "s_magnitude": s_length,
        "t_magnitude": t_length,
    }
    means = {name: masked_mean(value, keep).value for name, value in values.items()}
    # The original's ratio of means. A mean of ratios would be ruled by targets near zero.
    # 0 where the teacher is zero.
    return means | {"mag_ratio": Mean(means["s_magnitude"], means["t_magnitude"]).value}


def comparable(
    student: Array, target: Array, mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Both sides in float32 with zeros where they do not count, and ``vector_mask``."""
    keep = vector_mask(student, target, mask)
    return _counted(student, keep), _counted(target, keep), keep


def vector_mask(student: Array, target: Array, mask: Array | None) -> Array | None:
    """The mask of whole vectors: booleans [*B], or None for None. Mask, errors as ``mercator``."""
    if student.shape != target.shape:
        raise KavaError(
            f"student shape {student.shape} differs from target shape {target.shape}; "
            "map the layers and project one side to the other's heads and width first"
        )
    return _keep(mask, student.shape[:-1])


def _counted(x: Float[Array, "*B H"], keep: Array | None) -> Float[Array, "*B H"]:
    """X in float32, zero where its vector does not count, so that no NaN there gets a gradient."""
    x = x.astype(jnp.float32)
    return x if keep is None else jnp.where(keep[..., None], x, 0.0)


def _keep(mask: Array | None, leading: tuple[int, ...]) -> Array | None:
    """The mask as booleans over the leading axes; [B, T] is understood for [L, B, T, K]."""
    if mask is None:
        return None
    # Numpy's rules would align [B, T] with the last axes, tokens and heads. For the same reason a
    # mask of lower rank is refused below.
    aligned = mask[None, :, :, None] if (mask.ndim, len(leading)) == (2, 4) else mask
    fits = aligned.ndim == len(leading) and all(
        size in (1, axis) for size, axis in zip(aligned.shape, leading, strict=True)
    )
    if not fits:
        raise KavaError(
            f"mask shape {mask.shape} does not fit vectors laid out as {leading}; "
            "give it the same rank (size 1 broadcasts), or [B, T] for a cache [L, B, T, K, H]"
        )
    return jnp.broadcast_to(aligned != 0, leading)
