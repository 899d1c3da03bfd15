"""Values out of a parsed ``config.json``: of the right kind and size, or named and refused."""

from collections.abc import Mapping
from typing import Any

from kava_jax.errors import KavaError


def positive_int(
    config: Mapping[str, Any], key: str, where: str, *, default: int | None = None
) -> int:
    """``config[key]``, or the default where it is absent or null."""
    value = config.get(key)
    value = default if value is None else value
    # True is an int in Python, but as a size it is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise KavaError(f"{where}: {key}={value!r} is not a positive integer; correct config.json")
    return value


def positive_float(
    config: Mapping[str, Any], key: str, where: str, *, default: float | None = None
) -> float:
    """As a float; infinity and nan, which JSON readers let through, are refused too."""
    value: Any = config.get(key)
    value = default if value is None else value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise KavaError(f"{where}: {key}={value!r} is not a positive number; correct config.json")
    return float(value)


def of_each_layer(config: Mapping[str, Any], key: str, where: str) -> list[Any] | None:
    """``config[key]``, a list with an entry for each layer; None where it is absent or null."""
    value, depth = config.get(key), config.get("num_hidden_layers")
    if value is not None and (not isinstance(value, list) or len(value) != depth):
        raise KavaError(
            f"{where}: config.json: {key}={value!r} is no list of num_hidden_layers={depth} "
            "entries; correct it"
        )
    return value


def true_or_false(config: Mapping[str, Any], key: str, where: str) -> bool:
    """``config[key]``, false where it is absent or null. The text "false" is neither."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise KavaError(f"{where}: {key}={value!r} is neither true nor false; correct config.json")
    return bool(value)
