"""What a cosine alone hides, in numbers: its baselines, collapse, and who pulls the student.

A cosine of 0.95 can mean nothing: a shared offset r times as long as the content gives *unrelated*
vectors r^2 / (1 + r^2). ``alignment`` is what every step measures. ``diagnose`` compares all pairs
of a sample of tokens, so it is for evaluation: ``sample_tokens`` of each batch, ``join``,
``diagnose``. Everything works under ``jit``, with the batch axis sharded or not. A vector that
counts and holds NaN gives NaN (retrieval and quantiles excepted: it is not found, and left out).

Left out on purpose: what is good or bad (``verdict``), choosing and averaging layers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from kava_jax.errors import KavaError
from kava_jax.geometry import Mean, center, compare, cosine, magnitude, masked_mean, unit

# Cosines this close are one: nothing is retrieved by what may be rounding.
TIE = 1e-6
# A Gram matrix of which centring leaves less than this share holds only rounding.
ROUNDING = 1e-5


def alignment(
    student: Float[Array, "P B T K H"],
    target: Float[Array, "P B T K H"],
    mask_BT: Shaped[Array, "B T"],
    own: Float[Array, "P B T J D"] | None = None,
) -> dict[str, Mean]:
    """How well the student's vectors point where the target's do; each a Mean of [P] layers.

    cos            the student's vector and its target, the headline
    cos_shuffled   the student's vector and the target at the same position of the *next* example
    s_magnitude, t_magnitude   lengths of the student's own vectors, and of the targets

    Only vectors of tokens whose mask is not zero count; what the others hold does not matter.
    ``cos_shuffled`` counts a token where both examples have one, and nothing in a batch of one.
    ``own`` are the student's vectors before a projector, where ``student`` are those after it.
    """
    mask = (mask_BT != 0)[None, :, :, None]
    keep = jnp.broadcast_to(mask, student.shape[:-1])
    # In a batch of one the next example is the example itself, which is no baseline.
    both = keep & jnp.roll(keep, -1, axis=1) & (mask_BT.shape[0] > 1)
    cos, s_length, t_length = compare(student, target, keep)
    # Rolled as it came: a copy in float32 would be the largest array of the KV losses.
    cos_shuffled, _, _ = compare(student, jnp.roll(target, -1, axis=1), both)
    if own is not None:
        # Behind a projector that begins with a norm, lengths would be the projector's alone.
        s_length = magnitude(jnp.where(mask[..., None], own.astype(jnp.float32), 0.0))
    over = (1, 2, 3)
    return {
        "cos": masked_mean(cos, keep, over),
        "cos_shuffled": masked_mean(cos_shuffled, both, over),
        "s_magnitude": masked_mean(s_length, mask, over),
        "t_magnitude": masked_mean(t_length, mask, over),
    }


class TokenSample(NamedTuple):
    """Keys (or values) of n tokens in float32; where ``counted`` is False there is no token.

    ``own`` are the student's vectors before any projector.
    """

    student: Float[Array, "P n K H"]
    target: Float[Array, "P n K H"]
    counted: Bool[Array, "n"]
    own: Float[Array, "P n J D"]


def sample_tokens(
    student: Float[Array, "P B T K H"],
    target: Float[Array, "P B T K H"],
    mask_BT: Shaped[Array, "B T"],
    size: int,
    own: Float[Array, "P B T J D"] | None = None,
) -> TokenSample:
    """``size`` tokens, spread evenly over those of the batch that count, in row-major order.

    With ``total`` such tokens, entry i is number ``floor((i + 0.5) * total / size)``. If there are
    fewer than ``size``, each is taken once and the rest is not counted, and zero. ``own`` is that
    of ``alignment``.

    Raises:
        KavaError: ``size`` is below 1.
    """
    if size < 1:
        raise KavaError(f"size={size} tokens are no sample; 512 is usual")
    keep = (mask_BT != 0).reshape(-1)
    seen = jnp.cumsum(keep.astype(jnp.int32))
    total = seen[-1]
    entry = jnp.arange(size)
    # Under jit the sample has ``size`` entries whatever counts; ``counted`` says which are tokens.
    rank = jnp.where(total >= size, _spread(entry, total, size), entry)
    # The token of a rank is where that many and one have been seen.
    # A rank that does not exist is placed behind the end. The bound keeps the index valid, and
    # ``counted`` drops what is read there.
    place = jnp.minimum(jnp.searchsorted(seen, rank + 1), keep.size - 1)
    row, column = jnp.divmod(place, mask_BT.shape[1])
    counted = entry < total

    def taken(x: Array) -> Array:
        # float32 after the gather: before it, the cast would copy the whole cache.
        return jnp.where(counted[None, :, None, None], x[:, row, column].astype(jnp.float32), 0.0)

    own = student if own is None else own
    return TokenSample(taken(student), taken(target), counted, taken(own))


def _spread(entry: Int[Array, "n"], total: Int[Array, ""], size: int) -> Int[Array, "n"]:
    """``floor((entry + 0.5) * total / size)`` in int32, where the product itself would overflow."""
    # Whole numbers throughout, because float32 cannot tell tokens above 2**24 apart.
    whole, rest = jnp.divmod(total, size)
    twice = (2 * entry + 1) * whole
    return twice // 2 + ((twice % 2) * size + (2 * entry + 1) * rest) // (2 * size)


def join(samples: Sequence[TokenSample]) -> TokenSample:
    """Samples of several batches (at least one) as one sample."""
    student, target, counted, own = zip(*samples, strict=True)
    student, target, own = (jnp.concatenate(side, axis=1) for side in (student, target, own))
    return TokenSample(student, target, jnp.concatenate(counted), own)


def diagnose(sample: TokenSample) -> dict[str, Float[Array, "P"]]:
    """What a sample says of each layer; *vector* is one head's, *token* all K heads as one [K*H].

    cos_constant   the target's vectors and the best constant one of their layer and head (the
                   direction of the mean unit target); mean over heads and tokens
    cos_centered   after subtracting each side's mean over the sample, per layer and head; likewise
    retrieval      share of tokens whose own target has a higher cosine than every other token's; a
                   tie (within 1e-6) is not found, and one token alone is not either: 0
    retrieval_centered   the same after centring both sides
    cka            debiased linear CKA of tokens, in [-1, 1], near 0 for unrelated sides however
                   wide; 0 where undefined: fewer than 4 tokens, or a side without any variation
    student_rank, target_rank         effective rank of tokens: ``(tr C)^2 / tr(C^2)``, C their
                   covariance; 0 without any variation
    student_min_std, target_min_std   smallest standard deviation (1/n) of the K*H dimensions
    student_top3, target_top3         share of the squared norm in the 3 largest of them
    mag_ratio_q10, _q50, _q90         quantiles over tokens of |own| / |t|, each a mean over the
                   token's heads, where the target is not zero; 0 if it always is

    One layer is taken after the other: n x n matrices exist for one only.
    """

    def one(layer: tuple[Array, Array, Array]) -> dict[str, Array]:
        return _diagnose_layer(*layer, sample.counted)

    return jax.lax.map(one, (sample.student, sample.target, sample.own))


def _diagnose_layer(
    student: Float[Array, "n K H"],
    target: Float[Array, "n K H"],
    own: Float[Array, "n J D"],
    counted: Bool[Array, "n"],
) -> dict[str, Float[Array, ""]]:
    """The figures of one layer."""
    keep = counted[:, None, None]
    s, t, own = (jnp.where(keep, x.astype(jnp.float32), 0.0) for x in (student, target, own))
    # The mean cosine with a unit vector e is e . E[v], v the unit targets: largest along E[v].
    constant = jnp.broadcast_to(unit(masked_mean(unit(t), keep, 0).value), t.shape)
    s_centred, t_centred = (_centred(x, counted) for x in (s, t))
    s_gram, t_gram = (_gram(x) for x in (s_centred, t_centred))
    low, middle, high = _magnitude_ratios(own, t)
    return {
        "cos_constant": masked_mean(cosine(constant, t), keep[..., 0]).value,
        "cos_centered": masked_mean(cosine(s_centred, t_centred), keep[..., 0]).value,
        "retrieval": _retrieval(s, t, counted),
        "retrieval_centered": _retrieval(s_centred, t_centred, counted),
        "cka": _debiased_cka(s_gram, t_gram, counted),
        "student_rank": _participation_ratio(s_gram),
        "target_rank": _participation_ratio(t_gram),
        "student_min_std": _min_std(s_centred, counted),
        "target_min_std": _min_std(t_centred, counted),
        "student_top3": _top3(s),
        "target_top3": _top3(t),
        "mag_ratio_q10": low,
        "mag_ratio_q50": middle,
        "mag_ratio_q90": high,
    }


def _flat(x: Float[Array, "n K H"]) -> Float[Array, "n D"]:
    """All heads of a token as one vector."""
    return x.reshape(x.shape[0], -1)


def _scaled(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """X divided by its largest |entry|, so that squares neither overflow nor vanish, and that."""
    peak = jnp.max(jnp.abs(x), initial=0.0)
    return x / jnp.where(peak == 0, 1.0, peak), peak


def _centred(x: Float[Array, "n K H"], counted: Bool[Array, "n"]) -> Float[Array, "n K H"]:
    """X minus its mean over the tokens that count.

    A token is subtracted first: what does not vary is then exactly zero, not the rounding of a
    mean, whose direction would be compared and retrieved like any other.
    """
    moved = x - x[jnp.argmax(counted)][None]
    return center(moved, counted[:, None, None], 0)


def _gram(x: Float[Array, "n K H"]) -> Float[Array, "n n"]:
    """Products of all pairs of tokens, up to a common factor."""
    # The factor cancels in CKA and in the rank, which are ratios.
    flat, _ = _scaled(_flat(x))
    # Accelerators multiply in TF32 or bf16 unless told otherwise; centring needs their digits.
    return jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)


def _retrieval(
    s: Float[Array, "n K H"], t: Float[Array, "n K H"], counted: Bool[Array, "n"]
) -> Float[Array, ""]:
    """Share of tokens whose own target is strictly the nearest by angle."""
    highest = jax.lax.Precision.HIGHEST
    cos = jnp.matmul(unit(_flat(s)), unit(_flat(t)).T, precision=highest)
    # Rivals start from -inf and not from 0, because all cosines of a sample may be negative. A
    # token without any rival would then always be found, hence the last condition.
    other = counted[None, :] & ~jnp.eye(len(cos), dtype=bool)
    rival = jnp.max(jnp.where(other, cos, -jnp.inf), axis=1)
    found = (jnp.diagonal(cos) > rival + TIE) & (jnp.sum(counted) > 1)
    return masked_mean(found.astype(jnp.float32), counted).value


def _debiased_cka(
    s_gram: Float[Array, "n n"], t_gram: Float[Array, "n n"], counted: Bool[Array, "n"]
) -> Float[Array, ""]:
    """``HSIC(s, t) / sqrt(HSIC(s, s) * HSIC(t, t))`` with the unbiased HSIC.

    Song et al. 2012, equation 5, written as the product of U-centred matrices (Szekely and Rizzo
    2014); CKA after Kornblith et al. 2019. The factor 1 / (n (n - 3)) cancels.
    """
    s, s_alive = _u_centred(s_gram, counted)
    t, t_alive = _u_centred(t_gram, counted)
    length = jnp.sqrt(jnp.sum(s * s)) * jnp.sqrt(jnp.sum(t * t))
    # The unbiased HSIC divides by n - 3, so three tokens are too few.
    defined = s_alive & t_alive & (jnp.sum(counted) >= 4)
    return jnp.where(defined, jnp.sum(s * t) / jnp.where(defined, length, 1.0), 0.0)


def _u_centred(
    gram: Float[Array, "n n"], counted: Bool[Array, "n"]
) -> tuple[Float[Array, "n n"], Bool[Array, ""]]:
    """The off-diagonal part minus its row and column effects, and whether anything is left."""
    pair = counted[:, None] & counted[None, :] & ~jnp.eye(len(counted), dtype=bool)
    apart = jnp.where(pair, gram, 0.0)
    n = jnp.sum(counted).astype(jnp.float32)
    # With fewer than three tokens nothing is defined. The bounds only keep the quotients finite.
    row = jnp.sum(apart, axis=1, keepdims=True) / jnp.maximum(n - 2, 1)
    whole = jnp.sum(apart) / jnp.maximum((n - 1) * (n - 2), 1)
    rest = jnp.where(pair, apart - row - row.T + whole, 0.0)
    # Written so that NaN is alive, and stays visible.
    return rest, ~(jnp.sum(rest**2) <= ROUNDING**2 * jnp.sum(apart**2))


def _participation_ratio(gram: Float[Array, "n n"]) -> Float[Array, ""]:
    """``(tr C)^2 / tr(C^2)``: the covariance and the Gram matrix of tokens share eigenvalues."""
    squares = jnp.sum(gram**2)
    return jnp.where(squares == 0, 0.0, jnp.trace(gram) ** 2 / jnp.where(squares == 0, 1, squares))


def _min_std(centred: Float[Array, "n K H"], counted: Bool[Array, "n"]) -> Float[Array, ""]:
    """The smallest standard deviation of a dimension."""
    flat, peak = _scaled(_flat(centred))
    return peak * jnp.sqrt(jnp.min(masked_mean(flat**2, counted[:, None], 0).value))


def _top3(x: Float[Array, "n K H"]) -> Float[Array, ""]:
    """The share of the squared norm in the three largest dimensions; 0 if there is no norm."""
    energy = jnp.sum(_scaled(_flat(x))[0] ** 2, axis=0)
    largest, _ = jax.lax.top_k(energy, min(3, len(energy)))
    return Mean(jnp.sum(largest), jnp.sum(energy)).value


def _magnitude_ratios(
    s: Float[Array, "n J D"], t: Float[Array, "n K H"]
) -> tuple[Float[Array, ""], ...]:
    """Quantiles 0.1, 0.5 and 0.9 of |s| / |t|, means over a token's heads; linear between values.

    Zero targets have no ratio; tokens that do not count are such.
    """
    # Means over heads first: the two sides may have different numbers of heads.
    length_s, length_t = (magnitude(x).mean(axis=-1) for x in (s, t))
    defined = length_t > 0
    # NaN marks tokens without a ratio. ``nanquantile`` leaves them out without changing a shape.
    ratio = jnp.where(defined, length_s / jnp.where(defined, length_t, 1.0), jnp.nan)
    quantiles = jnp.nanquantile(ratio, jnp.array([0.1, 0.5, 0.9]))
    return tuple(jnp.where(jnp.any(defined), quantiles, 0.0))


def gradient_share(
    kv_grads: PyTree[Float[Array, "..."]], language_grads: PyTree[Float[Array, "..."]]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How strongly, and whether, the KV term pulls where the language terms do.

    ``(|kv| / |language|, cosine of the two)`` with each tree of gradients as one flat float32
    vector. The share is 0 where language is zero, the cosine where either is. Both trees have one
    structure.
    """
    trees = (_unit_tree(grads) for grads in (kv_grads, language_grads))
    (kv, kv_length), (language, length) = trees
    alive = length != 0
    share = jnp.where(alive, kv_length / jnp.where(alive, length, 1.0), 0.0)
    return share, jnp.clip(optax.tree.vdot(kv, language), -1.0, 1.0)


def _unit_tree(
    grads: PyTree[Float[Array, "..."]],
) -> tuple[PyTree[Float[Array, "..."]], Float[Array, ""]]:
    """A tree divided by its length, and that; zeros stay."""
    grads = optax.tree.cast(grads, jnp.float32)
    # Not divided, the squares of gradients below 1e-19 or above 1e19 leave float32.
    peak = optax.tree.norm(grads, ord="inf")
    scaled = jax.tree.map(lambda x: x / jnp.where(peak == 0, 1.0, peak), grads)
    length = optax.tree.norm(scaled)
    return jax.tree.map(lambda x: x / jnp.where(length == 0, 1.0, length), scaled), peak * length


def alignment_gap(cos: float, cos_shuffled: float | None) -> float | None:
    """``cos - cos_shuffled``, the headline; None where there is no baseline (None or NaN)."""
    if cos_shuffled is None or math.isnan(cos_shuffled):
        return None
    return cos - cos_shuffled
