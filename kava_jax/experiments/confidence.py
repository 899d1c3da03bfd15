"""Is the length of a key or value the model's confidence? Rank correlations by layer and KV head.

The original method says that a vector's direction carries meaning and its length confidence. There
are two readings of confidence at a token, and both are tested:

    entropy     of the next-token distribution there, in nats: how sure the model is of what follows
    surprisal   of the token itself, ``-log p(token | tokens before)``: how expected it was

Both fall as confidence rises, so the sentence predicts a *negative* rho with length. Three things
can pose as it. Position: the first tokens (attention sinks) are odd, and entropy falls along a
text. The token: a full stop has its own length and its own entropy, which says nothing of
confidence. And chance over texts: tokens of one text are not independent. So every rho is given
plainly, at equal position, and for one and the same token at equal position, with an interval over
texts. Beside it stand what length has to do with position and with frequency, and yardsticks: what
one coordinate of the *direction* reaches, and what can be read from the whole direction.

A prediction counts only where the model was trained to make it (``Batch.loss_mask``). Keys are
pre-RoPE; RoPE only rotates, so post-RoPE lengths are the same. Left out on purpose: lengths less
the bias of values, and vocabularies so wide that a batch's logits do not fit into memory.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from kava_jax.data.batches import Batch
from kava_jax.errors import KavaError
from kava_jax.models.decoder import Decoder, Params
from kava_jax.training.comparison import read

Confidence = Literal["entropy", "surprisal"]

# Numbers this close, relatively, are one: their order may be rounding, and at layer 0 it would be
# (all keys of one token are equal there).
TIE = 1e-6
# Of ranks of which a control leaves less than this share, only rounding is left.
ROUNDING = 1e-9
# Columns of ranks: outcome, position, frequency, and from here on lengths.
FIRST = 3


class Sample(NamedTuple):
    """What a model did at each of n real tokens, in the order of the texts; on the host."""

    row: Int[np.ndarray, "n"]
    """Which text, from 0."""
    position: Int[np.ndarray, "n"]
    token: Int[np.ndarray, "n"]
    entropy: Float[np.ndarray, "n"]
    """Nats; NaN where what follows is not a target."""
    surprisal: Float[np.ndarray, "n"]
    """Nats; NaN where the token is not a target."""
    vectors: dict[str, Float[np.ndarray, "n L K H"]]
    """``k`` (pre-RoPE), ``k_without_bias`` if keys have a bias, and ``v``."""


class Rho(NamedTuple):
    """Spearman's rho and the ends of its 95 % interval; None where one side does not vary."""

    rho: float | None
    low: float | None
    high: float | None


class Head(NamedTuple):
    """One KV head's correlations of length with entropy (or surprisal)."""

    part: str
    layer: int
    head: int
    plain: Rho
    at_position: Rho
    """Partial: ranks less what the rank of the position explains linearly."""
    same_token: Rho
    """Partial: ranks less their mean over the same token and what position explains then."""
    with_position: float | None
    """Length and position."""
    with_frequency: float | None
    """Length and how often the token is counted in this sample (its log has the same ranks)."""
    coordinate: float | None
    """Median |rho| of entropy (or surprisal) and one coordinate of the direction ``x / |x|``."""
    direction: float | None
    """Rho of entropy (or surprisal) and what a linear reader makes of the direction: fitted to
    ranks by least squares on every other text, measured on the rest."""
    direction_and_length: float | None
    """The same with the length as one more input."""


class Found(NamedTuple):
    """All heads of all parts, over ``tokens`` tokens of ``rows`` texts."""

    tokens: int
    rows: int
    heads: tuple[Head, ...]


class _Observed(NamedTuple):
    entropy: Float[Array, "B T"]
    surprisal: Float[Array, "B T"]
    vectors: dict[str, Float[Array, "L B T K H"]]


def take_sample(graph: nnx.GraphDef[Decoder], params: Params, batches: Iterable[Batch]) -> Sample:
    """Run a model over the batches and keep every real token; padding is dropped.

    Args:
        graph: of a decoder with a head.
        params: its parameters.
        batches: rows padded on the right; each is a text of its own.
    """
    look = jax.jit(partial(_observe, graph))
    pieces, rows = [], 0
    for batch in batches:
        found = jax.device_get(look(params, batch))
        tokens, valid, target = (
            np.asarray(x) for x in (batch.tokens, batch.valid, batch.loss_mask)
        )
        follows = np.pad(target[:, 1:], ((0, 0), (0, 1)))
        row, position = np.nonzero(valid)
        pieces.append(
            Sample(
                rows + row,
                position,
                tokens[valid],
                np.where(follows, found.entropy, np.nan)[valid],
                np.where(target, found.surprisal, np.nan)[valid],
                {part: np.moveaxis(x, 0, 2)[valid] for part, x in found.vectors.items()},
            )
        )
        rows += len(tokens)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def _observe(graph: nnx.GraphDef[Decoder], params: Params, batch: Batch) -> _Observed:
    reading = read(graph, params, batch)
    logits = reading.model.logits(reading.hidden)
    entropy, surprisal = entropy_and_surprisal(logits, batch.tokens)
    keys, bias = reading.cache.k, reading.model.key_bias()
    vectors = {"k": keys if bias is None else keys + bias[:, None, None]}
    if bias is not None:
        vectors["k_without_bias"] = keys
    vectors["v"] = reading.cache.v
    return _Observed(entropy, surprisal, vectors)


def entropy_and_surprisal(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Entropy of the distribution at each token, and the token's surprisal by the one before it.

    In nats, and accurate relatively, however small: with d = max - logit and r the sum of exp(-d)
    without the most likely token, ``log Z = log1p(r)``, entropy is ``log Z + sum(p * d)`` and
    surprisal ``log Z + d``. The surprisal of a row's first token means nothing.
    """
    below = jnp.max(logits, axis=-1, keepdims=True) - logits
    is_top = jnp.arange(logits.shape[-1])[None, None] == jnp.argmax(logits, axis=-1)[..., None]
    log_z = jnp.log1p(jnp.sum(jnp.where(is_top, 0.0, jnp.exp(-below)), axis=-1))
    entropy = log_z + jnp.sum(jnp.exp(-below - log_z[..., None]) * below, axis=-1)
    following = jnp.roll(tokens, -1, axis=1)[..., None]
    of_following = log_z + jnp.take_along_axis(below, following, axis=-1)[..., 0]
    return entropy, jnp.roll(of_following, 1, axis=1)


def length_and_confidence(
    sample: Sample, outcome: Confidence, *, skip: int = 4, draws: int = 200, seed: int = 0
) -> Found:
    """Rank correlations of every head's lengths with entropy or surprisal.

    The interval holds the middle 95 % of ``draws`` bootstrap draws: texts are drawn with
    replacement, whole, and everything is ranked anew. It is one head's own; with many heads some
    leave zero out by chance.

    Args:
        sample: of `take_sample`.
        outcome: ``"entropy"`` or ``"surprisal"``.
        skip: first tokens of each text that are left out (attention sinks); 0 for none.
        draws: bootstrap draws.
        seed: of the draws.

    Raises:
        KavaError: fewer than 2 texts, or 4 tokens, are left.
    """
    kept = _kept(sample, outcome, skip)
    places = _places(np.column_stack(kept.columns()))
    low, middle, high = _with_interval(places, kept, draws, seed)
    once = np.ones(len(kept.y))
    ranks = _midranks(places, once)
    position, frequency = (_correlations(ranks, once, of=of)[FIRST:] for of in (1, 2))
    heads = []
    for i, (part, layer, head) in enumerate(kept.names()):
        plain, at_position, same_token = (
            Rho(*map(_number, ends[:, i])) for ends in np.stack([middle, low, high], axis=1)
        )
        yardsticks = map(_number, _yardsticks(kept, part, layer, head))
        others = (_number(position[i]), _number(frequency[i]), *yardsticks)
        heads.append(Head(part, layer, head, plain, at_position, same_token, *others))
    return Found(len(kept.y), kept.rows, tuple(heads))


class _Kept(NamedTuple):
    """The tokens that count; rows and tokens numbered from 0 without gaps."""

    row: Int[np.ndarray, "n"]
    position: Int[np.ndarray, "n"]
    token: Int[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]
    vectors: dict[str, Float[np.ndarray, "n L K H"]]
    lengths: dict[str, Float[np.ndarray, "n L K"]]

    @property
    def rows(self) -> int:
        return int(self.row.max()) + 1

    def columns(self) -> list[np.ndarray]:
        """Outcome, position, frequency, and from ``FIRST`` on the lengths of all heads."""
        often = np.bincount(self.token)[self.token]
        lengths = (x.reshape(len(self.y), -1) for x in self.lengths.values())
        return [self.y, self.position, often, *lengths]

    def names(self) -> list[tuple[str, int, int]]:
        """Part, layer and head of every column of lengths."""
        return [
            (part, layer, head)
            for part, x in self.lengths.items()
            for layer, head in np.ndindex(x.shape[1], x.shape[2])
        ]


def _kept(sample: Sample, outcome: Confidence, skip: int) -> _Kept:
    y = getattr(sample, outcome)
    kept = np.flatnonzero((sample.position >= skip) & ~np.isnan(y))
    names, row = np.unique(sample.row[kept], return_inverse=True)
    if len(names) < 2 or len(kept) < 4:
        raise KavaError(
            f"skip={skip} leaves {len(kept)} tokens of {len(names)} texts, too few; give more texts"
        )
    _, token = np.unique(sample.token[kept], return_inverse=True)
    vectors = {part: x[kept].astype(np.float64) for part, x in sample.vectors.items()}
    lengths = {part: np.linalg.norm(x, axis=-1) for part, x in vectors.items()}
    return _Kept(row, sample.position[kept], token, y[kept], vectors, lengths)


def _with_interval(
    places: Int[np.ndarray, "n C"], kept: _Kept, draws: int, seed: int
) -> tuple[Float[np.ndarray, "3 M"], ...]:
    """Lower end, value and upper end of what `_three` gives, over draws of whole texts."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        times = np.bincount(rng.integers(kept.rows, size=kept.rows), minlength=kept.rows)
        drawn.append(_three(places, kept.token, times[kept.row].astype(np.float64)))
    low, high = np.quantile(np.stack(drawn), [0.025, 0.975], axis=0)
    return low, _three(places, kept.token, np.ones(len(kept.y))), high


def _three(
    places: Int[np.ndarray, "n C"], token: Int[np.ndarray, "n"], weight: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "3 M"]:
    """Rho of the outcome and each length: plain, at one position, for the same token as well."""
    ranks = _midranks(places, weight)
    return np.stack(
        [
            _correlations(ranks, weight)[FIRST:],
            _correlations(ranks, weight, position=True)[FIRST:],
            _correlations(ranks, weight, position=True, token=token)[FIRST:],
        ]
    )


def _yardsticks(kept: _Kept, part: str, layer: int, head: int) -> tuple[float, float, float]:
    """``coordinate``, ``direction`` and ``direction_and_length`` of one head."""
    vector, length = kept.vectors[part][:, layer, head], kept.lengths[part][:, layer, head, None]
    direction = vector / np.where(length > 0, length, 1.0)
    each = np.abs([_spearman(kept.y, own) for own in direction.T])
    each = each[~np.isnan(each)]
    typical = float(np.median(each)) if len(each) else np.nan
    learn = kept.row % 2 == 0
    both = np.column_stack([direction, length])
    return typical, _read(direction, kept.y, learn), _read(both, kept.y, learn)


def _read(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "n"], learn: Bool[np.ndarray, "n"]
) -> float:
    """Rho, where ``learn`` is False, of y and the linear reader of its ranks fitted elsewhere."""
    inputs = np.column_stack([x, np.ones(len(x))])
    ranks = _midranks(_places(y[learn][:, None]), np.ones(int(learn.sum())))[:, 0]
    weights = np.linalg.lstsq(inputs[learn], ranks, rcond=None)[0]
    return _spearman(y[~learn], inputs[~learn] @ weights)


def _spearman(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Spearman's rho; NaN where one side does not vary."""
    once = np.ones(len(x))
    return float(_correlations(_midranks(_places(np.column_stack([x, y])), once), once)[1])


def _places(values: Shaped[np.ndarray, "n C"]) -> Int[np.ndarray, "n C"]:
    """Place of every number among the different ones of its column, from 0.

    Neighbours within ``TIE`` of each other are equal.
    """
    places = np.empty(values.shape, np.int64)
    for column, own in enumerate(values.T):
        order = np.argsort(own, kind="stable")
        ordered = own[order]
        apart = np.diff(ordered) > TIE * np.abs(ordered[1:])
        places[order, column] = np.concatenate([[0], np.cumsum(apart)])
    return places


def _midranks(
    places: Int[np.ndarray, "n C"], weight: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n C"]:
    """Mean ranks (up to a constant) when every token comes ``weight`` times."""
    ranks = np.empty(places.shape)
    for column, own in enumerate(places.T):
        times = np.bincount(own, weight)
        ranks[:, column] = (np.cumsum(times) - times / 2)[own]
    return ranks


def _correlations(
    ranks: Float[np.ndarray, "n C"],
    weight: Float[np.ndarray, "n"],
    *,
    of: int = 0,
    position: bool = False,
    token: Int[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "C"]:
    """Correlation of column ``of`` with every column of ranks, tokens weighted.

    With ``token``, what differs between tokens is taken out first; with ``position``, what the
    ranks of column 1 explain of what is left. By Frisch and Waugh these are the residuals of one
    regression on both. NaN where nothing is left.
    """
    x = ranks - (weight @ ranks / weight.sum())[None]
    whole = weight @ x**2
    if token is not None:
        x = x - _mean_by(x, weight, token)
    if position and weight @ x[:, 1] ** 2 > ROUNDING * whole[1]:
        x = x - x[:, 1:2] * ((weight * x[:, 1]) @ x / (weight @ x[:, 1] ** 2))[None]
    left = weight @ x**2
    alive = left > ROUNDING * whole
    left = np.where(alive, left, np.nan)
    return (weight * x[:, of]) @ x / np.sqrt(left * left[of])


def _mean_by(
    x: Float[np.ndarray, "n C"], weight: Float[np.ndarray, "n"], group: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n C"]:
    """Every entry's weighted mean over its group; 0 for a group without weight."""
    from scipy.sparse import csr_array

    member = csr_array((weight, (group, np.arange(len(group)))))
    total = np.bincount(group, weight)
    return (member @ x / np.where(total > 0, total, 1.0)[:, None])[group]


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
