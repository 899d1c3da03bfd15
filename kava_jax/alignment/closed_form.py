"""Which teacher layers to map and how, in closed form from the moments of a calibration split.

Linear maps are fitted by ridge regression on ``grams`` of one split and scored, from the ``grams``
of another, by the share of the variance they explain. All in float64 on the host.

Left out on purpose: collecting the moments (``grams``), and the projector the fit is put into.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from kava_jax.alignment.grams import Grams
from kava_jax.alignment.projector import Direction
from kava_jax.errors import KavaError

# Moments of the keys and of the values.
GramsOfParts = Sequence[Grams]
# Of the keys ("k") and the values ("v") one affine map per mapped layer, ``y = x @ kernel + bias``,
# as a per-layer linear projector holds them: {"out": {"kernel": [P, I, O], "bias": [P, O]}}.
Fitted = dict[str, dict[str, dict[str, np.ndarray]]]


def linear_cka(grams: Grams, p: int, layer: int) -> float:
    """Linear centred kernel alignment of student layer p and a teacher layer, 0 to 1.

    ``|Cts|^2 / (|Ctt| |Css|)`` in Frobenius norms of the centred second moments; blind to rotation
    and scale of either side; 0 where a side is constant. Kornblith et al. 2019, section 3.
    """
    blocks = grams.cross_cov(p, (layer,)), grams.teacher_cov((layer,)), grams.student_cov(p)
    cross, teacher, student = map(np.linalg.norm, blocks)
    # This form needs moments of width E alone. Gram matrices of tokens would grow with the split.
    return float(cross**2 / (teacher * student)) if teacher * student > 0 else 0.0


def choose_by_cka(fits: GramsOfParts, p: int, window: tuple[int, ...]) -> int:
    """The teacher layer of the window with the highest CKA, mean of keys' and values'."""
    # Of equals ``max`` takes the first, so ties always go to the earlier layer.
    return max(window, key=lambda layer: sum(linear_cka(grams, p, layer) for grams in fits))


def ridge(
    cov_xx: Float[np.ndarray, "I I"],
    cov_xy: Float[np.ndarray, "I O"],
    mean_x: Float[np.ndarray, "I"],
    mean_y: Float[np.ndarray, "O"],
    strength: float | int,
) -> tuple[Float[np.ndarray, "I O"], Float[np.ndarray, "O"]]:
    """Kernel and bias, float64, of the ridge regression of y on x.

    ``W = (Cxx + strength * mean(diag Cxx) * I)^-1 Cxy`` by Cholesky, ``bias = mean_y - mean_x W``.
    The strength has no unit: it is relative to the mean variance of an input dimension. Inputs may
    be constant or repeat each other as long as it is not too near zero.

    Raises KavaError where it is, so that the matrix is not positive definite.
    """
    # Imported here, because only a fit needs scipy, while every training imports this module.
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    # Were every input constant, any positive ridge gives the same answer: no map, the mean of y.
    penalty = strength * (float(np.mean(np.diag(cov_xx))) or 1.0)
    try:
        # Cholesky refuses a matrix that is not positive definite. A general solver or an inverse
        # would answer with rounding, blown up.
        factor = cho_factor(cov_xx + penalty * np.eye(len(cov_xx)), lower=True)
    except LinAlgError:
        raise KavaError(
            f"calibration: ridge strength={strength} leaves {len(cov_xx)} input dimensions that "
            f"repeat each other or are constant; give more, or longer, training rows"
        ) from None
    kernel = cho_solve(factor, cov_xy)
    return kernel, mean_y - mean_x @ kernel


def r_squared(
    kernel: Float[np.ndarray, "I O"],
    bias: Float[np.ndarray, "O"],
    grams: Grams,
    p: int,
    layers: tuple[int, ...],
    direction: Direction,
) -> float:
    """``1 - SSE / SST`` of the map on the split that ``grams`` is of; 1 is perfect, 0 the mean.

    From the moments alone: ``SSE = tr Cyy - 2 tr W'Cxy + tr W'Cxx W + |mean_y - mean_x W - b|^2``
    and ``SST = tr Cyy``, about this split's own mean. Negative where the map does worse than that
    mean, 0 where the target is constant. Dimensions count by their variance.
    """
    cov_xx, cov_xy, mean_x, mean_y, variance_y = _moments(grams, p, layers, direction)
    if variance_y <= 0:
        return 0.0
    # ``tr K'A`` is the sum of entrywise products, so the square matrix is never made. SST cancels
    # against the 1 of ``1 - SSE / SST``.
    fitted = np.sum(kernel * (cov_xx @ kernel - 2 * cov_xy))
    mean_error = mean_y - mean_x @ kernel - bias
    return float(-(fitted + mean_error @ mean_error) / variance_y)


def choose_layers(
    fits: GramsOfParts,
    devs: GramsOfParts,
    p: int,
    window: tuple[int, ...],
    count: int,
    strength: float | int,
    direction: Direction,
) -> tuple[int, ...]:
    """The ``count`` teacher layers of the window that map best, ascending.

    Maps are fitted on the moments ``fits`` and scored by R^2 on those of ``devs``, mean of keys'
    and values'. Teacher to student: each round adds the layer that gives the highest score together
    with those already chosen. Student to teacher, where each layer is predicted by itself: the
    layers with the highest scores. Of equals the earlier.

    Raises KavaError for a count that the window does not hold.
    """
    if not 1 <= count <= len(window):
        raise KavaError(
            f"calibration: count={count} layers out of a window of {len(window)}; "
            f"choose 1 to {len(window)}"
        )

    def score(layers: tuple[int, ...]) -> float:
        # On the split that is fitted, further inputs raise the score even where they are noise.
        return sum(
            r_squared(*_solve(fit, p, layers, direction, strength), dev, p, layers, direction)
            for fit, dev in zip(fits, devs, strict=True)
        )

    # Each teacher layer is an output of its own here, so another layer changes no score. ``sorted``
    # keeps the order of equals, also in reverse.
    if direction == "student_to_teacher":
        ranked = sorted(window, key=lambda layer: score((layer,)), reverse=True)
        return tuple(sorted(ranked[:count]))
    # Greedily, 4 of 8 layers take 26 scores per student layer; all choices would take 70.
    chosen: tuple[int, ...] = ()
    for _ in range(count):
        chosen = max(((*chosen, layer) for layer in window if layer not in chosen), key=score)
    return tuple(sorted(chosen))


def fit(
    grams: GramsOfParts,
    rows: tuple[tuple[int, ...], ...],
    direction: Direction,
    strength: float | int,
) -> Fitted:
    """Ridge maps of keys and values for every mapped layer.

    Args:
        grams: moments of the keys and of the values.
        rows: per student layer of the moments its teacher layers, n in every row; side by side in
            this order they are the map's input (teacher to student, [P, n * Et, Es]) or its output
            (student to teacher, [P, Es, n * Et]).
        direction: which side is mapped onto the other.
        strength: see ``ridge``.

    Raises KavaError for another number of rows, for rows of different lengths, and for layers
    outside their window.
    """
    lengths = {len(row) for row in rows}
    students = len(grams[0].windows)
    if len(rows) != students or len(lengths) != 1 or 0 in lengths:
        raise KavaError(
            f"layer_map: {len(rows)} rows of lengths {sorted(lengths)} for {students} student "
            f"layers; give each student layer the same number of teacher layers"
        )

    def stack(side: Grams) -> dict[str, dict[str, np.ndarray]]:
        maps = [_solve(side, p, row, direction, strength) for p, row in enumerate(rows)]
        # Narrowed only now: parameters of adapters are float32, the solution needs float64.
        kernel, bias = (np.stack(x).astype(np.float32) for x in zip(*maps, strict=True))
        return {"out": {"kernel": kernel, "bias": bias}}

    return {part: stack(side) for part, side in zip("kv", grams, strict=True)}


def _solve(
    grams: Grams, p: int, layers: tuple[int, ...], direction: Direction, strength: float | int
) -> tuple[np.ndarray, np.ndarray]:
    return ridge(*_moments(grams, p, layers, direction)[:4], strength)


def _moments(
    grams: Grams, p: int, layers: tuple[int, ...], direction: Direction
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Cxx, Cxy, mean x, mean y and the summed variance of y, of a map from x to y."""
    cross = grams.cross_cov(p, layers)
    teacher, student = grams.teacher_cov(layers), grams.student_cov(p)
    mean_t, mean_s = grams.teacher_mean(layers), grams.student_mean(p)
    if direction == "teacher_to_student":
        return teacher, cross, mean_t, mean_s, float(np.trace(student))
    return student, cross.T, mean_s, mean_t, float(np.trace(teacher))
