"""Banded second moments of two models' caches, streamed once over a calibration split.

Everything ``calibrate`` needs of a student and a teacher is sums of ``x`` and of ``x y^T`` over
tokens. Each student layer has a window of W consecutive teacher layers as candidates, so of the
teacher's blocks only a band of W diagonals is needed. Keys and values are two separate streams.

E is the flattened width K * H of one token (``Es`` student, ``Et`` teacher), p a student layer's
place on the student axis; hand in only the mapped student layers where not all are mapped.

Left out on purpose: running the models, and what is solved from the moments (``calibrate``).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from kava_jax.errors import KavaError
from kava_jax.geometry import masked_mean

Windows = tuple[tuple[int, ...], ...]


class BatchGrams(NamedTuple):
    """Sums over one batch's counted tokens of x, and of outer products, each x less its shift.

    teacher   entry (d, i) is block (i, i + d), zero where there is no layer i + d
    cross     entry (p, w) is (teacher layer ``windows[p][w]``, student layer p)
    student   entry p is block (p, p)
    """

    teacher: Float[Array, "W Lt Et Et"]
    cross: Float[Array, "Ls W Et Es"]
    student: Float[Array, "Ls Es Es"]
    teacher_sum: Float[Array, "Lt Et"]
    student_sum: Float[Array, "Ls Es"]
    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)


def token_mean(x_LBTE: Float[Array, "L B T E"], mask_BT: Shaped[Array, "B T"]) -> Array:
    """Mean vector [L, E] of each layer over the counted tokens, float32; zero where none counts.

    Of the first batch, it is the shift: it need not be exact, only near.
    """
    return masked_mean(x_LBTE, mask_BT[None, :, :, None], (1, 2)).value


def batch_grams(
    student_LBTE: Float[Array, "Ls B T Es"],
    teacher_LBTE: Float[Array, "Lt B T Et"],
    mask_BT: Shaped[Array, "B T"],
    shift_s: Float[Array, "Ls Es"],
    shift_t: Float[Array, "Lt Et"],
    windows: Windows,
) -> BatchGrams:
    """Sums over the tokens whose mask is not zero of ``x - shift`` and of its outer products.

    float32 at the highest matmul precision (no TF32, no bf16 passes). The shift, ``token_mean`` of
    the first batch for all batches, keeps an offset that all tokens share from drowning the
    content. Tokens that do not count may hold NaN. ``windows`` is static under jit. The token axes
    may be sharded; the caller asks for a replicated result by ``out_shardings``.

    Raises KavaError for windows that ``Grams`` refuses.
    """
    width = check_windows(windows, student_LBTE.shape[0], teacher_LBTE.shape[0])
    s, t = (
        jnp.where((mask_BT != 0)[None, :, :, None], x.astype(jnp.float32) - m[:, None, None, :], 0)
        for x, m in ((student_LBTE, shift_s), (teacher_LBTE, shift_t))
    )
    # Zeros behind the last layer: a slice that starts too late is clamped by XLA, and would
    # silently be a block of other layers.
    padded = jnp.pad(t, ((0, width - 1), (0, 0), (0, 0), (0, 0)))

    def diagonal(offset: Array) -> Array:
        return _outer(t, jax.lax.dynamic_slice_in_dim(padded, offset, len(t)))

    # One diagonal, one column of the windows at a time: all at once would copy the teacher W times.
    columns = jnp.asarray(windows, jnp.int32).T
    return BatchGrams(
        teacher=jax.lax.map(diagonal, jnp.arange(width)),
        cross=jax.lax.map(lambda column: _outer(t[column], s), columns).swapaxes(0, 1),
        student=_outer(s, s),
        teacher_sum=jnp.sum(t, (1, 2)),
        student_sum=jnp.sum(s, (1, 2)),
        count=jnp.sum(mask_BT != 0, dtype=jnp.int32),
    )


def _outer(a: Float[Array, "L B T I"], b: Float[Array, "L B T O"]) -> Float[Array, "L I O"]:
    return jnp.einsum("lbti,lbto->lio", a, b, precision=jax.lax.Precision.HIGHEST)


class Grams:
    """Sum of any number of ``BatchGrams`` in float64 on the host, and the moments they give.

    Holds ``8 * (Lt * W * Et^2 + Ls * W * Et * Es + Ls * Es^2)`` bytes however many tokens there
    are: 3.7 GB for 48 layers of width 1024, 28 of 256 and windows of 8.
    """

    def __init__(
        self,
        shift_s: Float[Array | np.ndarray, "Ls Es"],
        shift_t: Float[Array | np.ndarray, "Lt Et"],
        windows: Windows,
    ):
        """Nothing counted yet; the shifts are those that every batch is summed with.

        Raises KavaError unless there is one window per student layer, all of the same number of
        consecutive teacher layers.
        """
        self.windows = windows
        self._shift_s, self._shift_t = (np.asarray(x, np.float64) for x in (shift_s, shift_t))
        (students, wide_s), (teachers, wide_t) = shift_s.shape, shift_t.shape
        width = check_windows(windows, students, teachers)
        # float32 sums over many batches lose digits. JAX has float64 only as a switch for the whole
        # process, so the sums are numpy's.
        self.count = 0
        self._teacher = np.zeros((width, teachers, wide_t, wide_t))
        self._cross = np.zeros((students, width, wide_t, wide_s))
        self._student = np.zeros((students, wide_s, wide_s))
        self._teacher_sum, self._student_sum = (
            np.zeros_like(x) for x in (self._shift_t, self._shift_s)
        )

    def add(self, batch: BatchGrams) -> None:
        """Count one more batch; KavaError, and nothing counted, where a sum is not finite."""
        batch = jax.device_get(batch)
        # A NaN that counts reaches these sums too, and they are small enough to look at each time.
        # Products of entries beyond 1e19 overflow where the sums do not; the diagonals show them.
        squares = (np.einsum("...ii->...i", moment) for moment in (batch.student, batch.teacher))
        looked_at = (batch.teacher_sum, batch.student_sum, *squares)
        if not all(np.isfinite(sums).all() for sums in looked_at):
            raise KavaError(
                "calibration: a counted token's keys or values are not finite; check the "
                "checkpoints, or run the models in a wider dtype"
            )
        self.count += int(batch.count)
        # In place: these arrays are gigabytes, and a second copy of them may not fit.
        self._teacher += batch.teacher
        self._cross += batch.cross
        self._student += batch.student
        self._teacher_sum += batch.teacher_sum
        self._student_sum += batch.student_sum

    def student_mean(self, p: int) -> Float[np.ndarray, "Es"]:
        """Mean of student layer p, its shift added back."""
        return self._shift_s[p] + self._student_sum[p] / self._tokens()

    def teacher_mean(self, layers: tuple[int, ...]) -> Float[np.ndarray, "nEt"]:
        """Means of several teacher layers, side by side in the order given."""
        rows = list(layers)
        return (self._shift_t[rows] + self._teacher_sum[rows] / self._tokens()).reshape(-1)

    def student_cov(self, p: int) -> Float[np.ndarray, "Es Es"]:
        """Centred second moment ``mean((s - mean s)(s - mean s)^T)`` of student layer p."""
        return self._centred(self._student[p], self._student_sum[p], self._student_sum[p])

    def teacher_cov(self, layers: tuple[int, ...]) -> Float[np.ndarray, "nEt nEt"]:
        """Centred second moment of several teacher layers of one window, side by side.

        Raises KavaError for layers further apart than a window reaches.
        """
        if max(layers) - min(layers) >= len(self._teacher):
            raise KavaError(
                f"calibration: teacher layers {list(layers)} are further apart than the window of "
                f"{len(self._teacher)}; choose layers of one window"
            )
        return np.block([[self._teacher_block(i, j) for j in layers] for i in layers])

    def cross_cov(self, p: int, layers: tuple[int, ...]) -> Float[np.ndarray, "nEt Es"]:
        """Centred second moment of teacher layers, side by side, with student layer p.

        Raises KavaError for a layer outside the window of p.
        """
        outside = sorted(set(layers) - set(self.windows[p]))
        if outside:
            raise KavaError(
                f"calibration: teacher layers {outside} are outside the window "
                f"{list(self.windows[p])} of student layer {p}; choose layers of the window"
            )
        first, ours = self.windows[p][0], self._student_sum[p]
        blocks = [
            self._centred(self._cross[p, layer - first], self._teacher_sum[layer], ours)
            for layer in layers
        ]
        return np.concatenate(blocks)

    def _teacher_block(self, i: int, j: int) -> np.ndarray:
        # Half of the band is enough, because block (j, i) is block (i, j) transposed.
        low, high = min(i, j), max(i, j)
        block = self._centred(
            self._teacher[high - low, low], self._teacher_sum[low], self._teacher_sum[high]
        )
        return block if i <= j else block.T

    def _centred(self, gram: np.ndarray, sum_a: np.ndarray, sum_b: np.ndarray) -> np.ndarray:
        """``(G - n mean_a mean_b^T) / n``; shift or not, it comes to the same."""
        tokens = self._tokens()
        return (gram - np.outer(sum_a / tokens, sum_b)) / tokens

    def _tokens(self) -> int:
        if self.count == 0:
            raise KavaError("calibration: count=0 tokens; give batches whose mask is not all zero")
        return self.count


def check_windows(windows: Windows, student_layers: int, teacher_layers: int) -> int:
    """Layers per window.

    Raises KavaError, listing the wrong rows, unless there is one window per student layer and all
    hold the same number of consecutive teacher layers, ascending.
    """
    # Equally many layers in every row make one array of the moments. Consecutive ones make a band
    # of diagonals hold every pair of layers in a window.
    width = len(windows[0]) if windows else 0
    wrong = [
        list(row)
        for row in windows
        if not row
        or row != tuple(range(row[0], row[0] + width))
        or not 0 <= row[0] <= teacher_layers - width
    ]
    if wrong or len(windows) != student_layers:
        raise KavaError(
            f"windows: {len(windows)} rows for {student_layers} student layers, wrong {wrong}; "
            f"give each student layer equally many consecutive layers of 0..{teacher_layers - 1}"
        )
    return width
