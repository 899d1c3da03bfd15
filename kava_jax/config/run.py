"""The configuration of a run, as frozen pydantic models; ``config_file`` reads and writes it.

The config stops at the edge: below the command line, functions take plain values. Model geometry
is not configured here but read from each model's own ``config.json``.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kava_jax.config.alignment import (
    CalibrationConfig,
    LossConfig,
    ProjectorConfig,
)
from kava_jax.config.values import (
    Address,
    AutoShare,
    Dtype,
    Positive,
    Ramp,
    Section,
    Share,
    Weight,
    is_zero,
)
from kava_jax.storage import Place, place

# What our own held-out rows are called beside those of `eval.sets`.
MAIN_SET = "held_out"
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
LayerMapName = Literal["ratio", "last", "cka", "calibrated"]


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = Field(
        default="run",
        min_length=1,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="what the run is called; letters, digits and . _ -",
    )
    dir: str | None = Field(
        default=None, description="run directory or gs://bucket/folder; runs/<name> when null"
    )
    seed: int = Field(default=0, ge=0, description="of fresh weights, order of rows, dropout")

    @field_validator("dir")
    @classmethod
    def _known_place(cls, written: str | None) -> str | None:
        if written is not None:
            place(written, "run.dir")
        return written

    @property
    def directory(self) -> Place:
        """The run directory: ``dir``, or ``runs/<name>``."""
        return place(self.dir or f"runs/{self.name}", "run.dir")


class TeacherConfig(Section):
    """One frozen teacher."""

    name: str = Field(
        default="teacher",
        min_length=1,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="what its figures are called; letters, digits and _ -",
    )
    path: Address = Field(description="Hugging Face directory, hub id, or builtin:demo_teacher")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    dtype: Dtype = Field(default="auto", description="auto: float32 on CPU, else bfloat16")
    weight: Weight = Field(default=1.0, description="of its losses among several teachers")
    layer_map: LayerMapName | tuple[tuple[int, int], ...] = Field(
        default="ratio",
        description="a name, or [teacher, student] layer pairs; cka and calibrated are measured",
    )
    control: Literal["none", "shuffled", "constant", "random"] = Field(
        default="none",
        description="a target that teaches nothing: the next row's, one vector, random weights",
    )


class StudentConfig(Section):
    """The model that learns: an existing one (``path``) or a fresh one (``geometry``)."""

    path: Address | None = Field(
        default=None, description="Hugging Face directory or hub id to start from"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    geometry: dict[str, Any] | None = Field(
        default=None, description="config.json keys of a student to be trained from random weights"
    )
    tokenizer: Address | None = Field(
        default=None, description="where from, when not from student or teacher"
    )
    dtype: Dtype = Field(default="auto", description="it computes in; its weights are float32")
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="what the backward pass computes again"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "StudentConfig":
        if (self.path is None) == (self.geometry is None):
            given = "both" if self.path else "neither"
            raise ValueError(f"give exactly one of path and geometry ({given} given)")
        return self


class DataConfig(Section):
    """Rows of text, how they become tokens, and which are held out."""

    path: Address = Field(
        description="JSON, JSONL, parquet or text file (.gz too), - for standard input, hub id, or "
        "builtin:word_problems"
    )
    subset: str | None = Field(default=None, description="name of a hub dataset's configuration")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    split: str = Field(default="train", description="of the generator, a directory or a hub id")
    eval_path: Address | None = Field(
        default=None, description="held-out rows; else cut from data.path"
    )
    eval_split: str | None = Field(default=None, description="held-out split of the same source")
    eval_rows: Positive = Field(default=256, description="number of held-out rows")
    rows: Positive | None = Field(
        default=None, description="use only the first so many training rows"
    )
    prompt_field: str = Field(default="question", description="field that holds the prompt")
    answer_field: str = Field(default="answer", description="field that holds the answer")
    messages_field: str | None = Field(default=None, description="field of a conversation")
    separator: str = Field(default="<|endoftext|>", description="between documents of a text file")
    format: Literal["qa", "template", "chat"] = Field(
        default="qa", description="how a row is written"
    )
    train_on: Literal["last", "assistant"] = Field(
        default="last", description="of a conversation: the last reply, or every one"
    )
    template: str | None = Field(default=None, description="with {prompt} and {answer}")
    max_length: int = Field(default=512, ge=8, description="longest row in tokens; the rest is cut")
    batching: Literal["bucketed", "shuffled"] = Field(
        default="shuffled", description="rows of a step: of like length, or of any"
    )
    bucket: Positive | None = Field(
        default=None,
        description="padded lengths are multiples of it; null: an eighth of max_length, and 8 for "
        "bucketed training rows",
    )
    batch_size: Positive = Field(default=32, description="rows of a step, over all devices")

    @property
    def length_bucket(self) -> int:
        """``bucket``, or an eighth of the longest row: at most eight shapes are ever compiled."""
        return self.bucket or -(-self.max_length // 8)

    @property
    def train_bucket(self) -> int:
        """Of training rows: finer when bucketed, where no more than eight multiples are used."""
        return self.bucket or (8 if self.batching == "bucketed" else self.length_bucket)

    @model_validator(mode="after")
    def _template_given(self) -> "DataConfig":
        if (self.format == "template") != (self.template is not None):
            raise ValueError("format=template and template=... go together; give both or neither")
        if self.train_on == "assistant" and self.format != "chat":
            raise ValueError(
                f"train_on=assistant, but format={self.format} has one answer a row; use "
                f"format=chat or leave train_on out"
            )
        return self


class OptimizerConfig(Section):
    """AdamW with two learning rates, clipped per group."""

    student_lr: Weight = Field(default=5e-5, description="peak rate of the student")
    projector_lr: Weight = Field(default=1e-3, description="peak rate of the projector")
    weight_decay: Weight = Field(default=0.01, description="of matrices, not of norms and biases")
    clip_norm: float = Field(default=1.0, gt=0, description="largest gradient norm of each group")
    b1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the mean gradient")
    b2: float = Field(default=0.999, ge=0, lt=1, description="AdamW: decay of its square")
    mean_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="AdamW: of the mean gradient; that of its square is float32"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the rates rise")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="of the rates, after warm-up"
    )
    final_lr_share: Share = Field(
        default=0.0, description="of the peak rate, reached at the last step"
    )


class TrainConfig(Section):
    """How long, and how often what happens."""

    steps: Positive = Field(default=1000, description="optimizer steps")
    grad_accumulation: Positive = Field(default=1, description="parts that a batch is computed in")
    attention: Literal["auto", "xla", "cudnn", "splash"] = Field(
        default="auto", description="its kernel; auto: the device's own where it can run, else xla"
    )
    log_every: Positive = Field(default=10, description="steps between two logged lines")
    eval_every: Positive | None = Field(default=None, description="null: only at the end")
    diagnose_every: Positive | None = Field(
        default=100, description="gradient shares and per-layer figures; null: never"
    )
    checkpoint_every: Positive = Field(default=500, description="one is also written at the end")
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="and at the first logged step so long after the last one"
    )
    keep_checkpoints: Positive = Field(default=2, description="the newest, and the best besides")
    most_skipped: Positive = Field(
        default=10, description="steps in a row that are not finite before the run stops"
    )


class EvalSet(Section):
    """More held-out rows, read as ``data`` is; their figures are named ``<set>/...``."""

    path: Address = Field(description="as data.path")
    split: str | None = Field(default=None, description="data.eval_split when null")
    rows: Positive = Field(default=256, description="number of rows")


class EvalConfig(Section):
    """Exact match on generated answers and further held-out sets, at the end of a run."""

    exact_match: bool = Field(default=True, description="needs prompt/answer data")
    exact_match_every: Positive | None = Field(
        default=None, description="at evaluations that fall on a multiple of it, too"
    )
    max_new_tokens: Positive = Field(default=256, description="longest answer")
    batch_size: Positive = Field(default=64, description="questions answered at once")
    sets: dict[SetName, EvalSet] = Field(
        default={}, description="by name: the test split, an old task, a shifted one, ..."
    )

    @model_validator(mode="after")
    def _names(self) -> "EvalConfig":
        if MAIN_SET in self.sets:
            raise ValueError(
                f"sets.{MAIN_SET}: that is what the rows of data.eval_path are called; give the "
                f"set another name"
            )
        return self


class MeshConfig(Section):
    """Devices along each axis; -1 fills (one axis at most)."""

    data: int = Field(default=-1, description="rows are split, weights repeated")
    fsdp: int = Field(default=1, description="rows and weights are split")
    tensor: int = Field(default=1, description="heads and feed-forward width are split")
    indivisible: Literal["error", "replicate"] = Field(
        default="error", description="axes of weights that a mesh axis does not divide"
    )

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            axes = ("data", "fsdp", "tensor")
            written = ", ".join(f"{axis}={n}" for axis, n in zip(axes, sizes, strict=True))
            raise ValueError(
                f"{written}, but each axis is a positive number or -1, and at most one is -1"
            )
        return self


class ProfileConfig(Section):
    """A trace of a few steps, written to ``<run>/profile``."""

    steps: str | None = Field(
        default=None,
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description="first:last, counted from 1: `10:15`",
    )

    @property
    def first_and_last(self) -> tuple[int, int] | None:
        """The steps as numbers."""
        if self.steps is None:
            return None
        first, last = self.steps.split(":")
        return int(first), int(last)

    @model_validator(mode="after")
    def _in_order(self) -> "ProfileConfig":
        if self.first_and_last and self.first_and_last[0] > self.first_and_last[1]:
            raise ValueError(f"steps={self.steps} ends before it begins; write first:last")
        return self


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    recipe: Literal["original", "anchored", "calibrated"] = Field(
        default="anchored", description="fields that are not given are set by it; see recipes.py"
    )
    teachers: tuple[TeacherConfig, ...] = ()
    student: StudentConfig
    projector: ProjectorConfig = ProjectorConfig()
    loss: LossConfig = LossConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers need different names, these repeat: {names}")
        if "student" in names:
            raise ValueError("a teacher cannot be called student; give it another name")
        if self.data.batch_size % self.train.grad_accumulation:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is not divisible by "
                f"train.grad_accumulation={self.train.grad_accumulation}; use a multiple"
            )
        rows = self.data.batch_size // self.train.grad_accumulation
        shuffled = [one.name for one in self.teachers if one.control == "shuffled"]
        if shuffled and rows < 2:
            raise ValueError(
                f"control=shuffled of teacher {shuffled[0]} gives a row the target of the next, "
                f"but data.batch_size={self.data.batch_size} with train.grad_accumulation="
                f"{self.train.grad_accumulation} leaves one row at a time; use two or more"
            )
        heard = self.teachers and (self.loss.kl_weight > 0 or not is_zero(self.loss.kv_weight))
        if is_zero(self.loss.ce_weight) and not heard:
            without = "loss.kv_weight=0 and loss.kl_weight=0" if self.teachers else "no teachers"
            raise ValueError(f"{without} and loss.ce_weight=0 leaves nothing to learn from")
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} exceeds "
                f"train.steps={self.train.steps}; lower it"
            )
        waits = self.projector.training == "warmup" and self.projector.warmup_steps
        if self.teachers and waits and waits + self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"projector.warmup_steps={waits} and optimizer.warmup_steps="
                f"{self.optimizer.warmup_steps} leave the student nothing of train.steps="
                f"{self.train.steps}; lower them"
            )
        weight = self.loss.ce_weight
        if isinstance(self.loss.kv_weight, AutoShare) and (isinstance(weight, Ramp) or not weight):
            written = "a ramp" if isinstance(weight, Ramp) else f"{weight:g}"
            raise ValueError(
                f"loss.kv_weight=auto({self.loss.kv_weight.share:g}) is a share of the "
                f"cross-entropy gradient, but loss.ce_weight={written}; give kv_weight a number"
            )
        if names and not any(teacher.weight for teacher in self.teachers):
            raise ValueError(
                f"no teacher has a weight above 0; give one to at least one of {names}"
            )
        traced = self.profile.first_and_last
        if traced and traced[0] > self.train.steps:
            raise ValueError(
                f"profile.steps={self.profile.steps} begins after the last of train.steps="
                f"{self.train.steps}; name earlier steps"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether a projector or a layer map comes out of a calibration."""
        measured = any(teacher.layer_map in ("cka", "calibrated") for teacher in self.teachers)
        return bool(self.teachers) and (measured or self.projector.init == "calibrated")
