"""Encoded rows to batches of fixed shapes, addressed by step number.

``BatchStream.batch(step)`` is a pure function of (rows, seed, step), so the step number is the
whole state of the iterator: nothing to save, and another number of hosts resumes the same stream.
Batches are numpy; putting them on devices is the caller's job.

Left out on purpose: packing several rows into one (it would need segment ids everywhere) and
background loading (a batch is an index and a copy).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError


class Batch(NamedTuple):
    """One global batch, or one process's rows of it: numpy on the host, jax on devices.

    Rows are padded on the right.
    """

    tokens: Int[Array, "B T"]
    """Ids, int32; the pad id where not valid."""
    valid: Bool[Array, "B T"]
    """Real tokens."""
    loss_mask: Bool[Array, "B T"]
    """Targets of cross-entropy: the answer and its end, never a row's first token. The prediction
    for position t is made at t - 1."""
    kv_mask: Bool[Array, "B T"]
    """Tokens whose keys and values are compared: valid and not among the first ``sink_tokens``."""


def abstract_batch(rows: int, length: int) -> Batch:
    """Shapes and dtypes of a batch, for compiling without one."""
    mask = jax.ShapeDtypeStruct((rows, length), np.bool_)
    return Batch(jax.ShapeDtypeStruct((rows, length), np.int32), mask, mask, mask)  # pyright: ignore[reportArgumentType]  (shapes in place of arrays)


class DataReport(NamedTuple):
    """What became of the rows on their way into batches."""

    rows: int
    """Rows in the batches (windows of documents count one by one)."""
    truncated: int
    """Of these, rows cut at ``max_length``."""
    dropped: int
    """Rows left out because nothing of the answer fits behind the prompt."""
    tokens: int
    """Real tokens of all rows."""
    targets: int
    """Of these, targets of cross-entropy."""
    padding: float
    """Share of padding among all positions of one epoch, 0 to 1."""
    max_length: int

    @property
    def sentence(self) -> str:
        """One line for people."""
        return (
            f"{self.rows} rows, {self.truncated} truncated to {self.max_length} tokens, "
            f"{self.dropped} dropped (prompt fills the row); {self.tokens} tokens, "
            f"{self.targets} of them trained on, {self.padding:.0%} padding"
        )


class BatchStream:
    """An endless, shuffled, resumable stream of batches over encoded rows.

    Every row comes once per epoch, in an order drawn from (seed, epoch); a batch that an epoch
    cannot fill goes on with the next epoch's order. The number of positions T is the batch's
    longest row rounded up to a multiple of ``bucket`` (at most ``max_length``), taken over the
    *global* batch, so that all processes agree and few shapes are compiled.

    Args:
        rows: encoded rows; those without a target are dropped and counted.
        batch_size: rows of the global batch.
        max_length: longest row, as given to the encoder.
        seed: of the shuffle.
        bucket: T is a multiple of this.
        pad_id: fills the rows; masks, not ids, tell padding apart.
        sink_tokens: leading tokens of each row that are left out of ``kv_mask``.

    Raises:
        KavaError: no row has a target, or a size is not positive.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        *,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        bucket: int = 64,
        pad_id: int = 0,
        sink_tokens: int = 4,
    ):
        for name, value in (("batch_size", batch_size), ("bucket", bucket)):
            if value < 1:
                raise KavaError(f"data.{name}={value} is not positive; use 1 or more")
        self.rows = _with_targets(rows, max_length)
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.bucket = bucket
        self.pad_id = pad_id
        self.sink_tokens = sink_tokens
        self._dropped = len(rows) - len(self.rows)
        self._lengths = np.array([len(row.ids) for row in self.rows])
        self._order = functools.lru_cache(maxsize=2)(self._order_of_epoch)

    @property
    def steps_per_epoch(self) -> float:
        """Batches until every row has come once; rarely whole."""
        return len(self.rows) / self.batch_size

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of this step (from 0), or this process's contiguous share of it.

        Raises:
            KavaError: the batch size is not a multiple of ``process_count``.
        """
        chosen = self.row_indices(step)
        length = self._padded_length(chosen)
        mine = chosen[_share(self.batch_size, process_index, process_count)]
        return collate([self.rows[i] for i in mine], length, self.pad_id, self.sink_tokens)

    @functools.cached_property
    def report(self) -> DataReport:
        """Counts over all rows, and the padding of the first epoch's batches."""
        steps = -(-len(self.rows) // self.batch_size)
        chosen = [self.row_indices(step) for step in range(steps)]
        positions = self.batch_size * sum(self._padded_length(rows) for rows in chosen)
        real = sum(int(self._lengths[rows].sum()) for rows in chosen)
        return DataReport(
            rows=len(self.rows),
            truncated=sum(row.truncated for row in self.rows),
            dropped=self._dropped,
            tokens=int(self._lengths.sum()),
            targets=sum(len(row.ids) - max(row.prompt_length, 1) for row in self.rows),
            padding=1 - real / positions,
            max_length=self.max_length,
        )

    def row_indices(self, step: int) -> Int[np.ndarray, "B"]:
        """Which of ``rows`` the global batch of this step holds."""
        places = step * self.batch_size + np.arange(self.batch_size)
        epochs, within = np.divmod(places, len(self.rows))
        return np.array([self._order(int(e))[w] for e, w in zip(epochs, within, strict=True)])

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return np.argsort(_mixed(self.seed, epoch, len(self.rows)), kind="stable")

    def _padded_length(self, chosen: np.ndarray) -> int:
        return _rounded(int(self._lengths[chosen].max()), self.bucket, self.max_length)


def eval_batches(
    rows: Sequence[Encoded],
    batch_size: int,
    *,
    max_length: int,
    bucket: int = 64,
    pad_id: int = 0,
    sink_tokens: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Held-out rows once, in order, rows without a target left out; see :class:`BatchStream`.

    The last batch is filled up with rows that are masked everywhere, so all have the same size.
    """
    kept = _with_targets(rows, max_length)
    filler = Encoded(np.zeros(0, np.int32), 0, False)
    share = _share(batch_size, process_index, process_count)
    for start in range(0, len(kept), batch_size):
        group = kept[start : start + batch_size]
        length = _rounded(max(len(row.ids) for row in group), bucket, max_length)
        group += [filler] * (batch_size - len(group))
        yield collate(group[share], length, pad_id, sink_tokens)


def collate(rows: Sequence[Encoded], length: int, pad_id: int, sink_tokens: int) -> Batch:
    """Rows padded on the right to ``length`` positions, with their masks."""
    tokens_BT = np.full((len(rows), length), pad_id, np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row.ids)] = row.ids
    position_1T = np.arange(length)[None]
    lengths_B1 = np.array([len(row.ids) for row in rows], np.int32)[:, None]
    targets_from_B1 = np.array([max(row.prompt_length, 1) for row in rows], np.int32)[:, None]
    valid_BT = position_1T < lengths_B1
    loss_mask_BT = valid_BT & (position_1T >= targets_from_B1)
    kv_mask_BT = valid_BT & (position_1T >= sink_tokens)
    arrays: tuple[Any, ...] = (tokens_BT, valid_BT, loss_mask_BT, kv_mask_BT)
    return Batch(*arrays)


def padded(batch: Batch, length: int) -> Batch:
    """The batch with positions added on the right that count nowhere; for one shape only."""
    missing = ((0, 0), (0, length - batch.tokens.shape[1]))
    arrays: tuple[Any, ...] = tuple(np.pad(array, missing) for array in batch)
    return Batch(*arrays)


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


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise KavaError(
            f"data.batch_size={batch_size} is not divisible by {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _rounded(length: int, bucket: int, max_length: int) -> int:
    return min(-(-length // bucket) * bucket, max_length)


def _mixed(seed: int, epoch: int, count: int) -> np.ndarray:
    """splitmix64 of (seed, epoch, place); numpy's own generators may change between versions."""
    z = np.arange(count, dtype=np.uint64)
    for salt in (seed, epoch):
        z = z + np.uint64((salt * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return z
