"""Batches of fixed shapes from encoded rows, addressed by step number.

``BatchStream.batch(step)`` is a pure function of (rows, seed, step). The step number is the whole
state of the iterator: there is nothing else to save, and a run may resume on another number of
hosts. Batches are numpy arrays; the caller puts them on devices.

Padding costs as much compute as real tokens. A batch of random rows is padded to the longest of
them. *Bucketed* batches hold rows that pad to the same length.

Left out on purpose: packing several rows into one (it would need segment ids everywhere) and
background loading (a batch is an index and a copy).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError

# Bucketed batches have at most this many padded lengths, because each one is compiled.
MOST_LENGTHS = 8


class Batch(NamedTuple):
    """A global batch (rows of all processes): numpy arrays on the host, jax arrays on devices.

    Rows are padded on the right.
    """

    tokens: Int[Array, "B T"]
    """Ids, int32; the pad id where not valid."""
    valid: Bool[Array, "B T"]
    """Real tokens."""
    loss_mask: Bool[Array, "B T"]
    """Targets of cross-entropy: the answer (or every reply) and its end, never a row's first token.
    The prediction for position t is made at t - 1."""
    kv_mask: Bool[Array, "B T"]
    """Tokens whose keys and values are compared: valid and not among the first ``sink_tokens``."""


def abstract_batch(rows: int, length: int) -> Batch:
    """Shapes and dtypes of a batch, for compiling without one."""
    mask = jax.ShapeDtypeStruct((rows, length), np.bool_)
    return Batch(jax.ShapeDtypeStruct((rows, length), np.int32), mask, mask, mask)  # pyright: ignore[reportArgumentType]  (shapes in place of arrays)


@dataclass(eq=False)
class BatchStream:
    """An endless, shuffled, resumable stream of batches over encoded rows.

    Every row comes once per epoch, in an order drawn from (seed, epoch). If an epoch cannot fill
    its last batch, the first rows of the next epoch complete it. The number of positions T is the
    longest row of the *global* batch, rounded up to a multiple of ``bucket`` (at most
    ``max_length``). So all processes agree on T, and few shapes are compiled.

    With ``bucketed``, T is one of at most eight of these multiples, chosen for the least padding. A
    bucket is the rows with the same T, and a batch takes its rows from one bucket. Each epoch draws
    the rows of each batch and the order of batches again. There are three exceptions:

    * The rows of a bucket rarely fill whole batches. Its last rows share a batch with the first
      rows of the next shorter bucket.
    * If an epoch cannot fill its last batch, that batch takes rows of the shortest bucket from
      this epoch and from the next one.
    * The first epoch starts with one batch of every T, the longest first. All shapes are then
      compiled, and the largest memory need appears, in the first steps.

    Args:
        rows: encoded rows; those without a target are dropped and counted.
        batch_size: rows of the global batch.
        max_length: longest row, as given to the encoder.
        seed: of the shuffle.
        bucketed: batch rows of similar length, as above; else any rows.
        bucket: T is a multiple of this.
        pad_id: fills the rows; masks, not ids, tell padding apart.
        sink_tokens: number of leading tokens of each row that ``kv_mask`` leaves out.

    Raises:
        KavaError: no row has a target, or a size is not positive.
    """

    rows: Sequence[Encoded]
    _: KW_ONLY
    batch_size: int
    max_length: int
    seed: int = 0
    bucketed: bool = False
    bucket: int = 64
    pad_id: int = 0
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("bucket", self.bucket)):
            if value < 1:
                raise KavaError(f"data.{name}={value} is not positive; use 1 or more")
        given, self.rows = len(self.rows), _with_targets(self.rows, self.max_length)
        self._dropped = given - len(self.rows)
        self._lengths = np.array([len(row.ids) for row in self.rows])
        padded_lengths = np.unique(
            [_rounded(int(n), self.bucket, self.max_length) for n in self._lengths]
        )
        if self.bucketed:
            # Batches take rows in order of length, longest first, so the first row of each batch is
            # its longest and determines its T.
            longest = -np.sort(-self._lengths)[:: self.batch_size]
            padded_lengths = best_lengths(longest, padded_lengths, MOST_LENGTHS)
        # The T that each row needs; a batch takes the largest of its rows.
        self._padded = padded_lengths[np.searchsorted(padded_lengths, self._lengths)]
        order = self._bucketed_order if self.bucketed else self._shuffled_order
        # The order is asked for once per row of a batch. Two orders are kept, because a batch may
        # reach into the next epoch.
        self._order = functools.lru_cache(maxsize=2)(order)

    def lengths(self, first: int, last: int) -> tuple[int, ...]:
        """Every T that the batches from step ``first`` to before ``last`` can have, ascending."""
        # A short rest of a run may miss some lengths, and each one left out saves a compilation. A
        # longer rest is taken to meet all of them, because looking at every step takes time.
        if last - first > MOST_LENGTHS:
            return tuple(int(length) for length in np.unique(self._padded))
        steps = range(first, last)
        return tuple(sorted({self._length(self.row_indices(step)) for step in steps}))

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        chosen = self.row_indices(step)
        rows = [self.rows[i] for i in chosen]
        return collate(rows, self._length(chosen), self.pad_id, self.sink_tokens)

    @functools.cached_property
    def counts(self) -> dict[str, int | float]:
        """Counts over all rows, and how much of the first epoch's batches is padding.

        ``truncated`` rows were cut at ``max_length``; ``dropped`` ones are left out because no
        token of the answer fits after the prompt. ``tokens`` are the real ones, and ``targets`` are
        trained on. ``padding`` is a share of all positions, 0 to 1. ``lengths`` is the
        number of padded lengths, for each of which the step is compiled.
        """
        steps = -(-len(self.rows) // self.batch_size)
        chosen = [self.row_indices(step) for step in range(steps)]
        padded_lengths = [self._length(rows) for rows in chosen]
        real = sum(int(self._lengths[rows].sum()) for rows in chosen)
        return {
            "rows": len(self.rows),
            "truncated": sum(row.truncated for row in self.rows),
            "dropped": self._dropped,
            "tokens": int(self._lengths.sum()),
            "targets": sum(int(row.targets.sum()) for row in self.rows),
            "padding": 1 - real / (self.batch_size * sum(padded_lengths)),
            "lengths": len(set(padded_lengths)),
        }

    @property
    def sentence(self) -> str:
        """The counts in one line for people."""
        n = self.counts
        return (
            f"{n['rows']} rows, {n['truncated']} truncated to {self.max_length} tokens, "
            f"{n['dropped']} dropped (prompt fills the row); {n['tokens']} tokens, "
            f"{n['targets']} of them trained on, {n['padding']:.0%} padding, "
            f"{n['lengths']} padded length{'s' if n['lengths'] > 1 else ''}"
        )

    def _length(self, rows: Int[np.ndarray, "B"]) -> int:
        return int(self._padded[rows].max())

    def row_indices(self, step: int) -> Int[np.ndarray, "B"]:
        """Which of ``rows`` the global batch of this step holds."""
        # Epochs follow each other without a gap. So the epoch and the place in it follow from the
        # step number alone, and nothing else has to be saved.
        places = step * self.batch_size + np.arange(self.batch_size)
        epochs, within = np.divmod(places, len(self.rows))
        return np.array([self._order(int(e))[w] for e, w in zip(epochs, within, strict=True)])

    def _shuffled_order(self, epoch: int) -> np.ndarray:
        # A stable sort defines the order of equal keys too, so the order does not depend on numpy's
        # sort.
        return np.argsort(_mixed(len(self.rows), self.seed, epoch), kind="stable")

    def _bucketed_order(self, epoch: int) -> np.ndarray:
        """The order of rows in an epoch whose batches take rows of similar length.

        First come the rows that complete the last batch of the epoch before, then whole batches,
        then the rows of a last batch that the next epoch completes.
        """
        order = self._shuffled_order(epoch)
        order = order[np.argsort(-self._padded[order], kind="stable")]  # still shuffled in a bucket
        # The epochs before have len(order) * epoch rows; this many complete their last batch. A
        # tiny data set may have fewer rows than that.
        head = min(-epoch * len(order) % self.batch_size, len(order))
        whole = (len(order) - head) // self.batch_size
        # The order is descending in length, so the rows that share a batch with another epoch are
        # the shortest ones, and that batch is padded little.
        rows, shared = np.split(order, [whole * self.batch_size])
        rows_WB = rows.reshape(whole, self.batch_size)
        # The extra salt makes the order of batches independent of the order of rows in them.
        rows_WB = rows_WB[np.argsort(_mixed(whole, self.seed, epoch, 1), kind="stable")]
        if epoch == 0:  # one batch of every T goes first
            # np.unique sorts ascending; the minus sign puts the longest batch first.
            _, one_of_each = np.unique(-self._padded[rows_WB].max(axis=1), return_index=True)
            others = np.delete(np.arange(whole), one_of_each)
            rows_WB = rows_WB[np.concatenate([one_of_each, others])]
        return np.concatenate([shared[:head], rows_WB.reshape(-1), shared[head:]])


def eval_batches(
    rows: Sequence[Encoded],
    batch_size: int,
    *,
    max_length: int,
    bucket: int = 64,
    pad_id: int = 0,
    sink_tokens: int = 4,
) -> Iterator[Batch]:
    """Held-out rows once, in order, without rows that have no target; see :class:`BatchStream`.

    Fully masked rows fill the last batch, so all batches have the same number of rows.
    """
    kept = _with_targets(rows, max_length)
    # A row without ids has no target and no valid token, so it adds nothing to any mean.
    filler = Encoded(np.zeros(0, np.int32), 0, False)
    for start in range(0, len(kept), batch_size):
        group = kept[start : start + batch_size]
        length = _rounded(max(len(row.ids) for row in group), bucket, max_length)
        group += [filler] * (batch_size - len(group))
        yield collate(group, length, pad_id, sink_tokens)


def collate(rows: Sequence[Encoded], length: int, pad_id: int, sink_tokens: int) -> Batch:
    """Rows padded on the right to ``length`` positions, with their masks."""
    tokens_BT = np.full((len(rows), length), pad_id, np.int32)
    loss_mask_BT = np.zeros((len(rows), length), bool)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row.ids)] = row.ids
        loss_mask_BT[b, : len(row.ids)] = row.targets
    position_1T = np.arange(length)[None]
    lengths_B1 = np.array([len(row.ids) for row in rows], np.int32)[:, None]
    valid_BT = position_1T < lengths_B1
    kv_mask_BT = valid_BT & (position_1T >= sink_tokens)
    arrays: tuple[Any, ...] = (tokens_BT, valid_BT, loss_mask_BT, kv_mask_BT)
    return Batch(*arrays)


def best_lengths(
    lengths: Int[np.ndarray, "R"], allowed: Int[np.ndarray, "M"], most: int
) -> Int[np.ndarray, "N"]:
    """At most ``most`` of the allowed lengths, chosen for the least padding.

    Exact, by dynamic programming: the best n lengths up to some length are that length plus the
    best n - 1 lengths up to a shorter one.

    Args:
        lengths: the lengths to pad, each to the next kept length.
        allowed: ascending; the last one holds the longest row and is always kept.
        most: 1 or more.

    Returns:
        The lengths that are kept, ascending.
    """
    held = np.searchsorted(np.sort(lengths), allowed, side="right")  # how many fit in each
    positions = held * allowed
    kept: list[tuple[int, ...]] = [(int(length),) for length in allowed]
    for _ in range(most - 1):
        for j in range(len(allowed) - 1, 0, -1):  # downwards: shorter ones still have n - 1
            # Rows up to the shorter length keep their cost; all longer ones are padded to
            # allowed[j].
            split = positions[:j] + (held[j] - held[:j]) * allowed[j]
            i = int(split.argmin())
            if split[i] < positions[j]:
                positions[j], kept[j] = split[i], (*kept[i], int(allowed[j]))
    return np.array(kept[-1])


def padded(batch: Batch, length: int) -> Batch:
    """The batch, padded on the right to ``length`` positions; the added ones are masked."""
    missing = ((0, 0), (0, length - batch.tokens.shape[1]))
    return jax.tree.map(lambda rows: np.pad(rows, missing), batch)


def _with_targets(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    longest = max((len(row.ids) for row in rows), default=0)
    if longest > max_length:
        raise KavaError(
            f"data.max_length={max_length} is shorter than a row of {longest} tokens; "
            "encode with the same max_length"
        )
    kept = [row for row in rows if row.has_loss]
    if not kept:
        raise KavaError(
            f"data.max_length={max_length} leaves no row with an answer to train on "
            f"({len(rows)} rows, all filled by their prompts); raise it"
        )
    return kept


def _rounded(length: int, bucket: int, max_length: int) -> int:
    # max_length need not be a multiple of the bucket, and no row is longer than it.
    return min(-(-length // bucket) * bucket, max_length)


def _mixed(count: int, *salts: int) -> np.ndarray:
    """splitmix64 of (salts, index), because numpy's generators may change between versions."""
    # The constants of splitmix64, and one multiplier of Steele and Vigna's for 64-bit generators.
    # It spreads small salts (seeds, epochs) over all bits.
    z = np.arange(count, dtype=np.uint64)
    for salt in salts:
        # The salt is reduced in Python's integers: numpy warns when a uint64 scalar overflows,
        # while arrays wrap around.
        z = z + np.uint64((salt * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z
