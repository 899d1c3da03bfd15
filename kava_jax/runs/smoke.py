"""``kava train CONFIG --smoke``: the wiring of any config in seconds, without weights.

Every model is replaced by a tiny random one of its family, written as a real Hugging Face
directory, so that import, fingerprints and export run as they will in earnest. Query and KV head
counts, the ratio of depths and the ratio of head dims are kept; widths, head dim and depth shrink.
A tokenizer or data set that cannot be had is replaced by the built-in one, and that is said.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.pair import CutConfig
from kava_jax.config.run import Config
from kava_jax.data.sources import BUILTIN_PROBLEMS, load_examples
from kava_jax.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer, vocabulary_size
from kava_jax.errors import KavaError
from kava_jax.hf.cut_record import CutRecord, write_cut_record
from kava_jax.hf.export import export_model
from kava_jax.hf.locate import CUT_RECORD
from kava_jax.hf.names import parameter_shapes
from kava_jax.journal.lock import alone
from kava_jax.journal.manifest import MANIFEST_NAME
from kava_jax.models.spec import DecoderSpec, LongRopeScaling
from kava_jax.parallel.hosts import meet
from kava_jax.runs.find_models import at_hand_or_downloaded, find_models
from kava_jax.storage import absolute, check_target, remove

# Two rows are the fewest with a shuffled cosine. Every other length of a batch is compiled again,
# and that, with a vocabulary of full size, is what a smoke run spends its time on.
STEPS, BATCH_ROWS, ROWS, HELD_OUT_ROWS, NEW_TOKENS = 3, 2, 64, 2, 8
LARGEST_DEPTH, LARGEST_HEAD_DIM, WIDTH_SHRINK = 8, 8, 64


def smoke_config(config: Config) -> Config:
    """The same run with tiny random models, a few steps, and its own run directory.

    An earlier smoke run there is removed: smoke runs start over, they do not continue. Of several
    processes the first one removes and writes, and the others wait for it.
    """
    named = config.run.directory
    check_target(named, "run.dir")
    named = absolute(named) if named.name in ("", "..") else named  # `.` has no name of its own
    directory = named.with_name(f"{named.name}-smoke")
    with alone(directory, "run.dir"):
        # Under the lock of the directory, where another smoke run may be at work.
        if jax.process_index() == 0 and (directory / MANIFEST_NAME).is_file():
            remove(directory)
    raw = dump_config(config)
    found = find_models(config, find=at_hand_or_downloaded)
    specs = {"student": found.student.spec}
    specs |= {f"teacher-{name}": teacher.spec for name, teacher in found.teachers.items()}
    divisor = _depth_divisor(specs.values())
    cut = config.student.cut
    if cut is not None:
        # The tiny student is cut, too: out of the tiny teacher, or of another tiny model.
        specs.pop("student")
        if cut.path is not None:
            specs["student"] = at_hand_or_downloaded(cut.path).spec
        raw["student"]["cut"] |= _tiny_cut(cut, divisor)
    tokenizer, source = _tokenizer(raw)
    raw["student"]["tokenizer"] = source
    _choose_rows(raw)
    # Models are read from disks alone.
    beside = directory.parent if isinstance(directory, Path) else Path("runs")
    models = beside / f"{directory.name}-models"
    head_dims = max(spec.head_dim for spec in specs.values())
    for name, spec in specs.items():
        tiny = _shrunk(spec, divisor, head_dims, vocabulary_size(tokenizer))
        if jax.process_index() == 0:
            (models / name / CUT_RECORD).unlink(missing_ok=True)  # no export wrote it
        card = f"# Tiny random {tiny.family}\n\nWritten by `kava train --smoke`.\n"
        write_random(models / name, tiny, tokenizer, card)
        if name == "student" and cut is None and jax.process_index() == 0:
            _write_origins(models / name, found.student.cut, divisor)
    meet("smoke models")  # which are read next, by all processes
    if cut is None:
        raw["student"] |= {"path": str(models / "student"), "geometry": None}
    elif cut.path is not None:
        raw["student"]["cut"]["path"] = str(models / "student")
    for teacher in raw["teachers"]:
        teacher["path"] = str(models / f"teacher-{teacher['name']}")
        teacher["layer_map"] = _thinned(teacher["layer_map"], divisor)
    # In every part of a batch, or a control that pairs rows would have nothing to pair.
    rows = math.lcm(BATCH_ROWS, jax.device_count())
    raw["data"]["batch_size"] = rows * config.train.grad_accumulation
    if config.loss.handoff and config.loss.handoff.read_alone:
        raw["loss"]["handoff"]["alone_share"] = 0.5  # a small share of two rows would be none
    raw["train"] |= {"steps": STEPS, "log_every": 1, "eval_every": None, "checkpoint_every": STEPS}
    raw["eval"] |= {"max_new_tokens": NEW_TOKENS, "batch_size": HELD_OUT_ROWS}
    raw["eval"]["exact_match_every"] = None
    if raw["projector"]["training"] == "warmup":
        raw["projector"]["warmup_steps"] = 1
    raw["optimizer"]["warmup_steps"] = min(1, raw["optimizer"]["warmup_steps"])
    # The real run's mesh need not divide the tiny widths.
    raw["mesh"] = {"data": -1, "fsdp": 1, "tensor": 1}
    raw["run"] |= {"name": f"{config.run.name}-smoke", "dir": str(directory)}
    return parse_config(raw)


def _tokenizer(raw: Mapping[str, Any]) -> tuple[Any, str]:
    student, teachers = raw["student"], raw["teachers"]
    candidates = (student["tokenizer"], student["path"], *(t["path"] for t in teachers[:1]))
    wanted = next((name for name in candidates if name), BUILTIN_TOKENIZER)
    try:
        return load_tokenizer(wanted), wanted
    except KavaError:
        # A tokenizer that was named is meant; one that would have come with a model is not there.
        if student["tokenizer"] is not None:
            raise
        _say(f"smoke: tokenizer of {wanted} was not found here, using {BUILTIN_TOKENIZER}")
        return load_tokenizer(BUILTIN_TOKENIZER), BUILTIN_TOKENIZER


def _choose_rows(raw: dict[str, Any]) -> None:
    """The first rows of the real data and of each further set, or generated ones in their place."""
    data, missing = raw["data"], set()

    def here(path: str) -> bool:
        return path.startswith("builtin:") or Path(path).exists()

    def found(path: str, split: str) -> bool:
        """Whether there are data; if not, that is said. A file that was named is meant."""
        if not here(path) and path not in missing:
            try:
                load_examples(path, split=split, subset=data["subset"], rows=1)
            except KavaError:
                if Path(path).suffix:
                    raise
                _say(f"smoke: data {path} was not found here, using {BUILTIN_PROBLEMS}")
                missing.add(path)
        return path not in missing

    own = found(data["path"], data["split"])
    for one in raw["eval"]["sets"].values():
        one["rows"] = HELD_OUT_ROWS
        if not found(one["path"], one["split"] or data["eval_split"] or data["split"]):
            one |= {"path": BUILTIN_PROBLEMS, "split": "test"}
    data["eval_rows"] = HELD_OUT_ROWS
    if not here(data["path"]):
        data["rows"] = min(ROWS, data["rows"] or ROWS)
    if not own:
        data |= {"path": BUILTIN_PROBLEMS, "split": "train", "eval_split": None}


def _depth_divisor(specs: Any) -> int:
    """The largest common divisor of all depths, or less, that leaves no model too deep."""
    depths = [spec.num_layers for spec in specs]
    # Only a common divisor keeps the ratio of the depths, by which layers are mapped.
    return math.gcd(*depths) if max(depths) > LARGEST_DEPTH else 1


def _shrunk(spec: DecoderSpec, depth: int, largest_head_dim: int, vocabulary: int) -> DecoderSpec:
    # Even, because RoPE turns pairs of dimensions.
    head_dim = max(2, 2 * (spec.head_dim * LARGEST_HEAD_DIM // largest_head_dim // 2))
    head_dim = min(spec.head_dim, head_dim)
    rotary_dim = spec.rotary_dim and max(2, 2 * (spec.rotary_dim * head_dim // spec.head_dim // 2))
    # Whole: transformers refuses widths that are no multiple of the heads, even with a head dim.
    of_head = -(-max(8, spec.hidden_size // WIDTH_SHRINK) // spec.num_heads)
    rope = spec.rope_scaling
    if isinstance(rope, LongRopeScaling):  # one factor for each pair of the head dim
        # Each pair that is left takes the factor of the pair at the same relative place.
        left = (rotary_dim or head_dim) // 2
        places = [pair * len(rope.short_factor) // left for pair in range(left)]
        fewer = {
            name: tuple(getattr(rope, name)[place] for place in places)
            for name in ("short_factor", "long_factor")
        }
        rope, of_head = dataclasses.replace(rope, **fewer), head_dim  # of Phi it wants this, too
    return dataclasses.replace(
        spec.among(tuple(range(max(1, spec.num_layers // depth)))),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        num_experts=min(spec.num_experts, 8),
        experts_per_token=min(spec.experts_per_token, 2),
        rope_scaling=rope,
        hidden_size=of_head * spec.num_heads,
        intermediate_size=max(16, spec.intermediate_size // WIDTH_SHRINK),
        # Not shrunk: every id of the real tokenizer needs a row.
        vocab_size=max(spec.vocab_size, vocabulary),
    )


def _thinned(layer_map: Any, divisor: int) -> Any:
    """Explicit layer pairs at the depths that are left, one for each student layer."""
    if layer_map is None or isinstance(layer_map, str):
        return layer_map
    teacher_of: dict[int, int] = {}
    for teacher, student in layer_map:
        teacher_of.setdefault(student // divisor, teacher // divisor)
    return [[teacher, student] for student, teacher in teacher_of.items()]


def _tiny_cut(cut: CutConfig, divisor: int) -> dict[str, Any]:
    """What is kept, at the depths and widths that are left; heads are kept as they are."""
    layers, units = cut.layers, cut.intermediate_size
    if isinstance(layers, int):
        layers //= divisor
    elif layers is not None:
        layers = [layer // divisor for layer in layers[::divisor]]
    return {"layers": layers, "intermediate_size": units and max(1, units // WIDTH_SHRINK)}


def _write_origins(where: Path, cut: CutRecord | None, divisor: int) -> None:
    """The record of a student's cut, at the depths that are left."""
    # Where the divisor leaves a rest, the cut model is as deep as none of the teachers.
    if cut is None or cut.teacher_layers % divisor:
        return
    # Layers rise by one at least, so the first of every ``divisor`` ones rise after division, too.
    layers = tuple(layer // divisor for layer in cut.layers[::divisor])
    depth = cut.teacher_layers // divisor
    tiny = cut.model_copy(update={"layers": layers, "teacher_layers": depth, "units": None})
    write_cut_record(where, tiny)


def write_random(where: Path, spec: DecoderSpec, tokenizer: Any, card: str, seed: int = 0) -> None:
    """A model drawn by numpy: compiling JAX's generator would take longer than training."""
    rng, flat = np.random.default_rng(seed), {}
    for path, shape in parameter_shapes(spec).items():
        noise = rng.standard_normal(shape, np.float32) * np.float32(spec.initializer_range)
        flat[path] = np.ones(shape, np.float32) if path.endswith("/scale") else noise
    params = unflatten_dict(flat, sep="/")
    export_model(where, params, spec, dtype="float32", tokenizer=tokenizer, card=card)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)
