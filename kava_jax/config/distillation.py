"""The config's sections about alignment: projector and losses."""

from typing import Literal

from pydantic import Field, model_validator

from kava_jax.alignment.adapters import AdapterKind, InitMethod
from kava_jax.alignment.frame import Center
from kava_jax.alignment.handoff import Reader
from kava_jax.alignment.kv_losses import Mercator
from kava_jax.alignment.layer_map import RuleMap
from kava_jax.alignment.projector import Direction
from kava_jax.config.weights import (
    AutoShare,
    KVWeight,
    NamedKVLoss,
    Positive,
    Ramp,
    Section,
    Weight,
)
from kava_jax.models.layers import Output
from kava_jax.training.comparison import ComparedKeys
from kava_jax.training.objective import Match, Parts


class ProjectorConfig(Section):
    """The bridge between the two caches' widths and heads."""

    kind: AdapterKind = Field(
        default="elastic",
        description="what an adapter is made of; linear is the plain baseline, identity passes "
        "vectors of equal heads as they are",
    )
    direction: Direction = Field(
        default="student_to_teacher",
        description="whose vectors are mapped into whose space; teacher_to_student is the original "
        "method's",
    )
    mlp_ratio: float = Field(
        default=1.0, gt=0, le=16, description="of kind elastic: hidden width over input width"
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="of kind elastic: dropout in its hidden layer"
    )
    init: InitMethod | Literal["calibrated", "merged"] = Field(
        default="xavier",
        description="first weights; calibrated fits them in closed form before training, merged "
        "merges the teacher's KV heads as student.cut did (both need kind linear and per_layer "
        "true)",
    )
    per_layer: bool = Field(
        default=False, description="one map per layer; false shares one map among all layers"
    )
    training: Literal["joint", "warmup", "frozen"] = Field(
        default="joint",
        description="joint learns with the student from the first step; warmup learns alone for "
        "warmup_steps first; frozen stays as it was initialised",
    )
    warmup_steps: Positive = Field(default=100, description="of training warmup")

    @model_validator(mode="after")
    def _learns(self) -> "ProjectorConfig":
        given = self.init in ("calibrated", "merged")
        if given and (self.kind != "linear" or not self.per_layer):
            raise ValueError(
                f"init={self.init} with kind={self.kind}, per_layer={self.per_layer}: it is one "
                f"linear map per layer; set kind=linear and per_layer=true"
            )
        if self.init == "merged" and self.direction != "teacher_to_student":
            raise ValueError(
                f"init=merged with direction={self.direction}: heads are merged on the teacher's "
                f"side; set direction=teacher_to_student"
            )
        if self.kind == "identity" and self.training == "warmup":
            raise ValueError(
                "training=warmup with kind=identity, which has nothing to learn; set "
                "training=joint, or kind=linear"
            )
        return self


class HandoffConfig(Section):
    """One model answers from another's prompt cache, and what it takes is learnt."""

    reader: Reader = Field(
        default="teacher",
        description="who reads the prompt (all but its last token); the other one answers",
    )
    train: Literal["both", "projector"] = Field(
        default="both", description="what learns; projector leaves the student as it is"
    )
    weight: Weight | Ramp = Field(
        default=1.0, description="of the language loss on answers to what was handed over"
    )
    alone_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="share of rows that a student which answers reads alone, so that it does not "
        "forget how; drawn in every step; none where the student does not learn",
    )
    layer_map: RuleMap | tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="the reader's layer for each of the answerer's: a rule, or [reader, answerer] "
        "pairs; null: origin for a student that was cut from a teacher of this depth, else ratio",
    )

    @property
    def read_alone(self) -> float:
        """The share of rows that the answerer reads alone."""
        return self.alone_share if self.reader == "teacher" and self.train == "both" else 0.0

    @property
    def compares(self) -> bool:
        """Whether the student reads any row by itself, and is compared with a teacher there."""
        return self.reader == "student" or self.read_alone > 0


class LossConfig(Section):
    """What is minimised: ce_weight x CE + kl_weight x KL + kv_weight x KV."""

    kv: NamedKVLoss = Field(
        default=Mercator(),
        description="how far two keys (or values, or outputs) are apart: a name, or a mapping with "
        "the kind and its fields",
    )
    match: Match = Field(
        default="cache",
        description="what is compared: cache is keys and values; attention adds the KL between "
        "what the space's queries attend to in both caches; attention_outputs is what a layer's "
        "attention adds to the residual stream, block_outputs is that stream after the layer",
    )
    kv_weight: KVWeight = Field(
        default=1.0,
        description="a number, a ramp, or a share of the language gradient (cross-entropy and KL "
        "as weighted); the first thing to tune: too strong a pull harms",
    )
    parts: Parts = Field(
        default="both", description="which part is pulled; the other one is only measured"
    )
    ce_weight: Weight | Ramp = Field(default=1.0, description="weight of cross-entropy")
    kl_weight: Weight | Ramp = Field(
        default=0.0,
        description="weight of logit KL; above 0 the whole teacher is loaded, with its head",
    )
    kl_temperature: float = Field(
        default=1.0, gt=0, description="temperature of both softmaxes in logit KL"
    )
    key_space: ComparedKeys = Field(
        default="pre_rope", description="keys are compared before or after RoPE"
    )
    # Attention sinks: over 98 % of activation spikes sit at position 0 (arXiv 2603.05498).
    sink_tokens: int = Field(
        default=4, ge=0, description="first tokens of a row that the KV loss leaves out"
    )
    remove_key_bias: bool = Field(
        default=False, description="compare keys without their projection's bias"
    )
    center: Center = Field(
        default="none",
        description="subtract means per layer and head, on both sides: none, the batch's, or "
        "running means over past steps",
    )
    handoff: HandoffConfig | None = Field(
        default=None, description="answers from a prompt cache that is handed over; null: none"
    )

    @model_validator(mode="after")
    def _fitting(self) -> "LossConfig":
        if self.remove_key_bias and self.key_space == "post_rope":
            raise ValueError(
                "remove_key_bias=true with key_space=post_rope: RoPE has turned the bias by then; "
                "set key_space=pre_rope"
            )
        about_caches = {"parts": "both", "key_space": "pre_rope", "remove_key_bias": False}
        for field, needed in about_caches.items():
            value = getattr(self, field)
            if self.output is not None and value != needed:
                raise ValueError(
                    f"match={self.match} with {field}={str(value).lower()}: that is a choice about "
                    f"keys and values; set {field}={str(needed).lower()}, or match=cache"
                )
        if self.handoff is not None and self.match != "cache":
            raise ValueError(
                f"match={self.match} with handoff, whose forward passes keep caches alone; set "
                f"match=cache"
            )
        return self

    @property
    def output(self) -> Output | None:
        """The output of layers that is compared; None where keys and values are."""
        return None if self.match in ("cache", "attention") else self.match

    @property
    def share(self) -> AutoShare | None:
        """How the KV weight is measured; None where it is a number or a ramp."""
        return self.kv_weight if isinstance(self.kv_weight, AutoShare) else None
