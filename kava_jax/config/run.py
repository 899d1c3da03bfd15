"""The configuration of a run, as frozen pydantic models; ``file`` reads and writes it.

The config names what it configures: every list of choices belongs to the code that implements them.
Below ``runs``, functions take plain values. Model geometry is read from each model's own
``config.json``.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kava_jax.config.distillation import LossConfig, ProjectorConfig
from kava_jax.config.pair import StudentConfig, TeacherConfig
from kava_jax.config.weights import (
    Address,
    AutoShare,
    Dtype,
    Positive,
    Section,
    Share,
    Weight,
    is_zero,
)
from kava_jax.data.chat import TrainOn
from kava_jax.models.attend import Asked
from kava_jax.parallel.sharding import Indivisible
from kava_jax.storage import Place, place

# The name of the run's own held-out rows among ``eval.sets``.
MAIN_SET = "held_out"
# No slash, which separates folders, and a set's name from the figure in ``metrics.jsonl``.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]


def _known_place(written: str) -> str:
    place(written, "run.dir")
    return written


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: Name = Field(default="run", description="name of the run; letters, digits and . _ -")
    dir: Annotated[str, AfterValidator(_known_place)] | None = Field(
        default=None, description="run directory or gs://bucket/folder; runs/<name> when null"
    )
    seed: int = Field(
        default=0, ge=0, description="seeds fresh weights, the order of rows, and dropout"
    )

    @property
    def directory(self) -> Place:
        """The run directory: ``dir``, or ``runs/<name>``."""
        return place(self.dir or f"runs/{self.name}", "run.dir")


def _names(value: Any) -> Any:
    """One name is that of a conversation, as a list of one."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and (
        len(value) not in (1, 2) or value[-1] is None or value == [None]
    ):
        raise PydanticCustomError(
            "fields",
            "write [prompt, answer], [null, text] for plain documents, or the name of a "
            "conversation",
        )
    return value


def _known_format(written: str) -> str:
    if written not in ("qa", "chat") and not ("{prompt}" in written and "{answer}" in written):
        raise PydanticCustomError("format", "write qa, chat, or a text with {prompt} and {answer}")
    return written


class DataConfig(Section):
    """Rows of text, how they become tokens, and which are held out."""

    path: Address = Field(
        description="JSON, JSONL, parquet or text file (.gz too), - for standard input, hub id "
        "(id@revision pins it), or builtin:word_problems"
    )
    subset: str | None = Field(default=None, description="configuration of a hub data set")
    split: str = Field(
        default="train", description="split of the generator, a directory or a hub data set"
    )
    eval_path: Address | None = Field(
        default=None, description="held-out rows; null: eval_split, else cut from the training rows"
    )
    eval_split: str | None = Field(default=None, description="held-out split of the same source")
    eval_rows: Positive = Field(default=256, description="number of held-out rows")
    rows: Positive | None = Field(default=None, description="use only the first training rows")
    fields: Annotated[tuple[str | None, ...], BeforeValidator(_names)] = Field(
        default=("question", "answer"),
        description="fields of a row that hold prompt and answer; [null, text] reads plain "
        "documents, and a single name reads a conversation",
    )
    format: Annotated[str, AfterValidator(_known_format)] = Field(
        default="qa",
        description="how a row is written: qa, chat (the tokenizer's template), or a text with "
        "{prompt} and {answer}",
    )
    train_on: TrainOn = Field(
        default="last", description="replies of a conversation that are learnt: the last, or all"
    )
    max_length: int = Field(
        default=512, ge=8, description="longest row in tokens; longer ones are cut"
    )
    batching: Literal["bucketed", "shuffled"] = Field(
        default="shuffled",
        description="bucketed puts rows of similar length into a batch, which saves padding",
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
    def _one_answer(self) -> "DataConfig":
        if self.train_on == "assistant" and self.format != "chat":
            raise ValueError(
                f"train_on=assistant, but format={self.format} has one answer a row; use "
                f"format=chat or leave train_on out"
            )
        return self


class OptimizerConfig(Section):
    """AdamW with two learning rates, clipped per group; the rates follow a cosine."""

    student_lr: Weight = Field(
        default=5e-5, description="peak rate of the student; fresh weights want about 1e-3"
    )
    projector_lr: Weight = Field(default=1e-3, description="peak rate of the projector")
    weight_decay: Weight = Field(
        default=0.01, description="decoupled decay of matrices; norms and biases have none"
    )
    clip_norm: float = Field(default=1.0, gt=0, description="largest gradient norm of each group")
    b2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    mu_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the first moment; bfloat16 saves 2 bytes a weight"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the rates rise")
    min_lr_ratio: Share = Field(
        default=0.0,
        description="last over peak rate; 1 keeps the rates constant after the warm-up",
    )


class TrainConfig(Section):
    """How long a run takes, and how often what happens."""

    steps: Positive = Field(default=1000, description="optimizer steps")
    grad_accumulation: Positive = Field(
        default=1, description="microbatches of a step; more when a batch does not fit"
    )
    dtype: Dtype = Field(
        default="auto",
        description="dtype that the models compute in; auto: float32 on CPU, else bfloat16; the "
        "student's weights stay float32",
    )
    attention: Asked = Field(
        default="auto", description="attention kernel; auto: the device's own where it can run"
    )
    log_every: Positive = Field(default=10, description="steps between two logged lines")
    eval_every: Positive | None = Field(
        default=None, description="steps between two evaluations; null: only at the end"
    )
    diagnose_every: Positive | None = Field(
        default=100,
        description="steps between two measurements of gradient shares and layers; null: never",
    )
    checkpoint_every: Positive = Field(
        default=500, description="steps between two checkpoints; the last step has one as well"
    )
    max_to_keep: Positive = Field(
        default=2, description="newest checkpoints that are kept, apart from the best one"
    )
    max_consecutive_skips: Positive = Field(
        default=10, description="steps in a row that are not finite before the run stops"
    )


class EvalSet(Section):
    """More held-out rows, read as ``data`` is; their metrics are named ``<set>/...``."""

    path: Address = Field(description="as data.path")
    split: str | None = Field(default=None, description="data.eval_split when null")
    rows: Positive = Field(default=256, description="number of rows")


class EvalConfig(Section):
    """Exact match on generated answers and further held-out sets, at the end of a run."""

    exact_match_every: Positive | None = Field(
        default=None, description="also at evaluations on a multiple of this; null: at the end"
    )
    max_new_tokens: int = Field(
        default=256, ge=0, description="longest answer in tokens; 0: no answers, no exact match"
    )
    batch_size: Positive = Field(default=64, description="questions that are answered at once")
    sets: dict[Name, EvalSet] = Field(
        default={}, description="by name: a test split, an old task, ..., measured at the end"
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

    data: int = Field(default=-1, description="splits rows, repeats weights")
    fsdp: int = Field(default=1, description="splits rows and weights")
    tensor: int = Field(default=1, description="splits heads and the feed-forward width")
    indivisible: Indivisible = Field(
        default="error",
        description="axes of weights that a mesh axis does not divide; replicate repeats them",
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


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    recipe: Literal["original", "anchored", "calibrated", "healed"] = Field(
        default="anchored", description="sets fields that the file does not; see `kava explain`"
    )
    teachers: tuple[TeacherConfig, ...] = ()
    student: StudentConfig
    projector: ProjectorConfig = ProjectorConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        cut = self.student.cut
        if cut is not None and cut.path is None and not self.teachers:
            raise ValueError("student.cut without teachers; name the model that is cut: cut.path")
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers need different names, these repeat: {names}")
        # Where models are kept by name, the student is kept under this one.
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
                f"control=shuffled of teacher {shuffled[0]} gives a row the target of another, "
                f"but data.batch_size={self.data.batch_size} with train.grad_accumulation="
                f"{self.train.grad_accumulation} leaves one row at a time; use two or more"
            )
        loss = self.loss
        heard = self.teachers and not (is_zero(loss.kl_weight) and is_zero(loss.kv_weight))
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
        silent = is_zero(loss.ce_weight) and is_zero(loss.kl_weight)
        if isinstance(loss.kv_weight, AutoShare) and silent:
            raise ValueError(
                f"loss.kv_weight=auto({loss.kv_weight.share:g}) is a share of the gradient of "
                f"cross-entropy and logit KL, but loss.ce_weight=0 and loss.kl_weight=0; give one "
                f"of them a weight, or kv_weight a number"
            )
        if self.needs_calibration and self.loss.output is not None:
            raise ValueError(
                f"loss.match={self.loss.match}: a calibration fits keys and values only; set "
                f"projector.init=xavier and give teachers a layer_map by a rule, or set "
                f"loss.match=cache"
            )
        if self.projector.init == "merged" and (self.student.cut is None or loss.output):
            raise ValueError(
                f"projector.init=merged with student.cut={self.student.cut}, loss.match="
                f"{loss.match}: it merges keys and values as the run's own cut does; set "
                f"student.cut and match=cache, or projector.init=calibrated"
            )
        if loss.handoff is not None and (share := loss.handoff.read_alone):
            alone = round(share * self.data.batch_size)
            if alone in (0, self.data.batch_size):
                raise ValueError(
                    f"loss.handoff.alone_share={share:g} leaves {alone} of data.batch_size="
                    f"{self.data.batch_size} rows to be read alone; give a share that leaves some "
                    f"and not all, or 0"
                )
        if loss.handoff is not None and not self.teachers:
            raise ValueError(
                "loss.handoff without teachers: there is no one to hand over to or from"
            )
        if names and not any(teacher.weight for teacher in self.teachers):
            raise ValueError(
                f"no teacher has a weight above 0; give one to at least one of {names}"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether a projector or a layer map comes out of a calibration."""
        measured = any(teacher.layer_map in ("cka", "calibrated") for teacher in self.teachers)
        return bool(self.teachers) and (measured or self.projector.init == "calibrated")
