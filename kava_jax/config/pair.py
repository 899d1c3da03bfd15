"""The config's sections about the models: teachers and student."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kava_jax.alignment.controls import Control
from kava_jax.alignment.layer_map import LayerMapName
from kava_jax.config.weights import Address, Positive, Section, Weight
from kava_jax.hf.cut import Rule
from kava_jax.models.decoder import Remat


class TeacherConfig(Section):
    """One frozen teacher."""

    name: str = Field(
        default="teacher",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="name in metrics and tables; letters, digits and _ -",
    )
    path: Address = Field(
        description="Hugging Face directory, hub id (id@revision pins it), or builtin:demo_teacher"
    )
    weight: Weight = Field(
        default=1.0, description="weight of its losses; at 0 it is only measured"
    )
    layer_map: LayerMapName | tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="which of its layers the student's are compared with: a rule (cka and "
        "calibrated are measured before training), or [teacher, student] pairs; null: origin for a "
        "student that was cut from a teacher of this depth, else ratio",
    )
    control: Control = Field(
        default="none",
        description="a target that teaches nothing, to see whether the cache helps or any pull "
        "would: another row's cache, one mean vector, or random weights",
    )


def _counted(value: Any) -> Any:
    """A number of layers, or a list of them."""
    if value is None or isinstance(value, list | tuple) or type(value) is int:
        return value
    raise PydanticCustomError("layers", "write a number of layers, or a list such as [0, 1, 2]")


class CutConfig(Section):
    """A student made out of a bigger model by leaving parts of it out (``kava cut``)."""

    path: Address | None = Field(
        default=None, description="the model that is cut; null: the first teacher"
    )
    layers: Annotated[
        Positive | tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_counted)
    ] = Field(
        default=None,
        description="how many layers are kept, or which ones, counted from 0; null: all",
    )
    rule: Rule = Field(
        default="middle",
        description="which layers are kept of a number of them: evenly, all but a block out of the "
        "middle, or (measured on training rows) those without which the loss rises most: single "
        "layers, or all but the best block",
    )
    kv_heads: Positive | None = Field(
        default=None, description="KV heads that are left, each merged of neighbours; null: all"
    )
    intermediate_size: Positive | None = Field(
        default=None,
        description="feed-forward units that are left in a layer, the most active ones; null: all",
    )


class StudentConfig(Section):
    """The model that learns: an existing one, a fresh one, or one cut out of a bigger model."""

    path: Address | None = Field(
        default=None, description="Hugging Face directory or hub id (id@revision pins it)"
    )
    geometry: dict[str, Any] | None = Field(
        default=None, description="config.json keys of a student to train from random weights"
    )
    cut: CutConfig | None = Field(
        default=None, description="what is left of a bigger model, usually of the teacher"
    )
    tokenizer: Address | None = Field(
        default=None, description="source of the tokenizer; null: the student, else the teacher"
    )
    remat: Remat = Field(
        default="none",
        description="what the backward pass recomputes; when memory runs out: dots, then full",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "StudentConfig":
        origins = {name: getattr(self, name) for name in ("path", "geometry", "cut")}
        given = [name for name, origin in origins.items() if origin is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of path, geometry and cut "
                f"({' and '.join(given) or 'none'} given)"
            )
        return self
