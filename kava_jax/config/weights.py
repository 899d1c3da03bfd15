"""What the config's fields may hold beyond plain numbers and names: ramps, measured shares."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import PydanticCustomError

from kava_jax.alignment.kv_losses import AnyKVLoss, KVLoss
from kava_jax.storage import written_out

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What is read: a path, or a name of something else. No shell has expanded a ``~`` in a YAML file.
Address = Annotated[str, AfterValidator(written_out)]


def _no_float16(value: Any) -> Any:
    if value == "float16":
        raise PydanticCustomError(
            "dtype", "its gradients vanish without loss scaling, and there is none; use bfloat16"
        )
    return value


Dtype = Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(_no_float16)]


class Section(BaseModel):
    """Base of all sections: frozen, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Ramp(Section):
    """A weight that moves linearly from ``start`` to ``end``, and then stays there.

    It takes the share ``over`` of the run's steps: all of them by default.
    """

    start: Weight
    end: Weight
    over: float = Field(default=1.0, gt=0, le=1)


class AutoShare(Section):
    """A weight that keeps the KV gradient at a share of the language gradient.

    ``share`` is ``||weight * g_kv|| / ||ce_weight * g_ce + kl_weight * g_kl||`` over the student's
    parameters, with the weights of that step, measured every ``every`` steps (and more often at the
    start). ``auto(0.2)`` is short for ``{share: 0.2}``.
    """

    share: float = Field(gt=0, le=10)
    every: Positive = 20


def _auto(value: Any) -> Any:
    """The mapping that ``auto(0.2)`` is short for; any other text must be a number."""
    if not isinstance(value, str):
        return value
    if written := re.fullmatch(r"auto\(\s*([0-9.eE+-]+)\s*\)", value):
        return {"share": written[1]}
    try:
        return float(value)
    except ValueError:
        raise PydanticCustomError(
            "weight", "write a number, auto(0.2), or a mapping with start and end"
        ) from None


def _kind_of_weight(value: Any) -> str:
    """Which of the three forms is meant, so that only its own errors are reported."""
    if isinstance(value, AutoShare) or (isinstance(value, dict) and "share" in value):
        return "auto"
    return "ramp" if isinstance(value, Ramp | dict) else "number"


# The last of these runs first, so ``auto(0.2)`` is a mapping when the discriminator sees it.
KVWeight = Annotated[
    Annotated[Weight, Tag("number")]
    | Annotated[Ramp, Tag("ramp")]
    | Annotated[AutoShare, Tag("auto")],
    Discriminator(_kind_of_weight),
    BeforeValidator(_auto),
]


def _named(value: Any) -> Any:
    """``mse`` is short for ``{kind: mse}``; fields without a kind are Mercator's."""
    if isinstance(value, dict):
        return {"kind": "mercator", **value}
    return value if isinstance(value, KVLoss) else {"kind": value}


NamedKVLoss = Annotated[
    Annotated[AnyKVLoss, Discriminator("kind")],
    BeforeValidator(_named),
]


def is_zero(weight: "float | Ramp | AutoShare") -> bool:
    """Whether a weight is 0 throughout."""
    if isinstance(weight, Ramp):
        return weight.start == weight.end == 0
    return weight == 0
