"""The config's sections about alignment: projector, losses and calibration."""

from typing import Literal

from pydantic import Field, model_validator

from kava_jax.config.values import KVWeight, Positive, Ramp, Section, Weight, is_zero


class ProjectorConfig(Section):
    """The bridge between the two caches' widths and heads.

    ``training``: ``joint`` learns beside the student from the first step; ``warmup`` learns alone
    for the first ``warmup_steps``, then beside the student; ``frozen`` stays as it was initialised.
    """

    kind: Literal["elastic", "linear"] = Field(
        default="elastic", description="what an adapter is made of"
    )
    direction: Literal["student_to_teacher", "teacher_to_student"] = Field(
        default="student_to_teacher", description="whose vectors are mapped into whose space"
    )
    mlp_ratio: float = Field(
        default=1.0, gt=0, le=16, description="elastic: hidden over input width"
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="elastic: in its hidden layer")
    init: Literal["xavier", "kaiming", "normal", "calibrated"] = Field(
        default="xavier", description="calibrated: fitted in closed form before training"
    )
    per_layer: bool = Field(default=False, description="one map per layer, not shared by all")
    training: Literal["joint", "warmup", "frozen"] = Field(
        default="joint", description="how the projector learns"
    )
    warmup_steps: Positive = Field(default=100, description="of training=warmup")

    @model_validator(mode="after")
    def _calibrated(self) -> "ProjectorConfig":
        if self.init == "calibrated" and (self.kind != "linear" or not self.per_layer):
            raise ValueError(
                f"init=calibrated with kind={self.kind}, per_layer={self.per_layer}: the fit is "
                f"one linear map per layer; set kind=linear and per_layer=true"
            )
        return self


class LossConfig(Section):
    """What is minimised: ce_weight * CE + kl_weight * KL + kv_weight * KV.

    ``remove_key_bias`` to ``per_head`` say in which frame keys and values are compared.
    """

    kv: Literal["mercator", "mse", "smooth_l1", "hybrid", "structural"] = Field(
        default="mercator", description="how far two keys (or values) are from each other"
    )
    kv_weight: KVWeight = Field(
        default=1.0, description="a number, a ramp, or a share of the cross-entropy gradient"
    )
    parts: Literal["both", "keys", "values"] = Field(
        default="both", description="what is compared; the other part is only measured"
    )
    alpha: Weight = Field(default=1.0, description="mercator: weight of the direction term")
    beta: Weight = Field(default=0.01, description="mercator: weight of the log-magnitude term")
    mercator_weight: Weight | Ramp = Field(default=0.8, description="hybrid: of Mercator")
    mse_weight: Weight | Ramp = Field(default=0.2, description="hybrid: of MSE")
    attention_weight: Weight = Field(default=1.0, description="structural: of the attention KL")
    ce_weight: Weight | Ramp = Field(default=1.0, description="of cross-entropy")
    kl_weight: Weight = Field(default=0.0, description="of logit KL")
    kl_temperature: float = Field(default=1.0, gt=0, description="of both softmaxes in logit KL")
    key_space: Literal["pre_rope", "post_rope"] = Field(
        default="pre_rope", description="keys before or after RoPE has turned them"
    )
    sink_tokens: int = Field(
        default=4, ge=0, description="first tokens of a row left out of the KV loss"
    )
    remove_key_bias: bool = Field(
        default=False, description="compare keys without their projection's bias"
    )
    center: Literal["none", "batch", "running"] = Field(
        default="none", description="subtract means per layer and head, on both sides"
    )
    per_head: bool = Field(default=True, description="false: one vector per token, all heads")

    @model_validator(mode="after")
    def _fitting(self) -> "LossConfig":
        if self.remove_key_bias and self.key_space == "post_rope":
            raise ValueError(
                "remove_key_bias=true with key_space=post_rope: RoPE has turned the bias by then; "
                "set key_space=pre_rope"
            )
        if not self._compares:
            raise ValueError(
                f"kv={self.kv} with alpha={self.alpha:g}, beta={self.beta:g}"
                + (", mercator_weight=0, mse_weight=0" if self.kv == "hybrid" else "")
                + " compares nothing; raise one, or set kv_weight=0 for no KV loss"
            )
        return self

    @property
    def _compares(self) -> bool:
        """Whether any term of the KV loss has a weight."""
        mercator = self.alpha > 0 or self.beta > 0
        if self.kv == "hybrid":
            hears_mercator = mercator and not is_zero(self.mercator_weight)
            return hears_mercator or not is_zero(self.mse_weight)
        return mercator or self.kv != "mercator"


class CalibrationConfig(Section):
    """The closed-form fit of projectors and layer maps that are asked for by name."""

    rows: Positive = Field(default=512, description="training rows to fit and score on")
    layers: int = Field(default=4, ge=1, le=8, description="teacher layers per student layer")
    ridge: float = Field(default=1e-4, gt=0, description="times the mean variance of the inputs")
