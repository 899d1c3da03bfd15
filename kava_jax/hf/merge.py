"""Key and value heads turned towards one another, so that neighbours can be merged by their mean.

A decoder computes the same in many bases. A value head may be turned by any orthogonal matrix if
the output projection of its query heads takes the inverse. A key head may be turned only by what
commutes with RoPE, one plane rotation for each pair (i, i + H/2), and its query heads turn with it.
Two heads that hold the same in different bases would cancel in a plain mean; turned first, they
agree. Turns are found on the weights, with the bias as one more row: inputs of unit variance give
each row of the kernel the weight that the bias has.

Everything is float64. K' heads are left of K, each the mean of ``K / K'`` neighbours, so query head
n reads head ``n // (N / K')`` afterwards.

Left out on purpose: keys behind a norm. Its scale is shared by all heads and does not commute with
turns, so those keys are merged as they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float

# Heads are turned towards the first of their group, and not towards the mean, which is zero where
# turned copies cancel. Then in each round towards the mean of the last, which can only grow.
_ROUNDS = 4


class Turns(NamedTuple):
    """How each of a layer's K heads is turned."""

    keys: Complex[np.ndarray, "K h"]
    """Numbers of length 1 that multiply the pair (i, i + H/2), read as real and imaginary part."""
    values: Float[np.ndarray, "K H H"]
    """Orthogonal; a value v, as a row, becomes ``v @ turn``."""


def find_turns(
    k_RKH: Float[np.ndarray, "R K H"],
    v_RKH: Float[np.ndarray, "R K H"],
    left: int,
    *,
    turn_keys: bool = True,
) -> Turns:
    """Turns that bring the heads of each of ``left`` groups of neighbours together.

    Args:
        k_RKH: kernel [D, K, H] of the keys, and their bias as one more row where there is one.
        v_RKH: the same of the values.
        left: K', a divisor of K.
        turn_keys: false where a norm follows the key projection.
    """
    groups = range(left)
    k_RLGH, v_RLGH = (x.reshape(len(x), left, -1, x.shape[-1]) for x in (k_RKH, v_RKH))
    values = np.concatenate([_value_turns(v_RLGH[:, group]) for group in groups])
    if turn_keys:
        keys = np.concatenate([_key_turns(_as_pairs(k_RLGH[:, group])) for group in groups])
    else:
        keys = np.ones((k_RKH.shape[1], k_RKH.shape[2] // 2), complex)
    return Turns(keys, values)


def turned(path: str, part: np.ndarray, turns: Turns, heads: Sequence[int]) -> np.ndarray:
    """A parameter of the layer after the turns: of q, k, v or o, a kernel or a bias.

    Args:
        path: our path of the parameter, such as ``blocks/attention/q/kernel``.
        part: in our layout, of the heads [.., heads, H] in question, or [heads, H, D] of o.
        turns: of the layer.
        heads: the KV head that each head of ``part`` is, or reads.
    """
    owners = np.asarray(heads)
    match path.split("/")[-2]:
        case "q" | "k":
            pairs = _as_pairs(part) * turns.keys[owners]
            return np.concatenate([np.real(pairs), np.imag(pairs)], axis=-1)
        case "v":
            return (part[..., None, :] @ turns.values[owners])[..., 0, :]
        case _:
            return turns.values[owners].swapaxes(1, 2) @ part


def _as_pairs(x: Float[np.ndarray, "*B H"]) -> Complex[np.ndarray, "*B h"]:
    first, second = np.split(x, 2, axis=-1)
    return first + 1j * second


def _key_turns(k_RGh: Complex[np.ndarray, "R G h"]) -> Complex[np.ndarray, "G h"]:
    def towards(target_Rh: np.ndarray) -> np.ndarray:
        """The turns p with the largest ``Re sum(conj(target) * k * p)``."""
        inner = np.einsum("rh,rgh->gh", target_Rh, k_RGh.conj())
        size = np.abs(inner)
        return np.where(size > 0, inner / np.where(size > 0, size, 1), 1)

    turns = towards(k_RGh[:, 0])
    for _ in range(_ROUNDS):
        turns = towards((k_RGh * turns).mean(axis=1))
    return turns


def _value_turns(v_RGH: Float[np.ndarray, "R G H"]) -> Float[np.ndarray, "G H H"]:
    # Imported here, because only a merge needs scipy, while every import of weights comes by.
    from scipy.linalg import orthogonal_procrustes

    heads = v_RGH.swapaxes(0, 1)

    def towards(target_RH: np.ndarray) -> np.ndarray:
        return np.stack([orthogonal_procrustes(head, target_RH)[0] for head in heads])

    turns = towards(heads[0])
    for _ in range(_ROUNDS):
        turns = towards((heads @ turns).mean(axis=0))
    return turns
