"""The tables of docs/config.md, written from the config's own models.

    python docs/config_table.py          rewrite the tables in docs/config.md
    python docs/config_table.py loss     print one section's table

Type, default, range and meaning come from kava_jax/config/run.py; the last column, when to touch a
field, is kept here. A field without its line here, or a line without its field, is an error.
"""

import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kava_jax.config.run import Config

PAGE = Path(__file__).resolve().parent / "config.md"

# Section and field -> touch it when.
WHEN: dict[str, dict[str, str]] = {
    "top": {
        "recipe": "the target is to be kept still in another way; see `kava explain`",
    },
    "run": {
        "name": "always: give every experiment its own",
        "dir": "the run shall live elsewhere",
        "seed": "repeating a run to see its spread",
    },
    "teachers": {
        "name": "there are several teachers",
        "path": "always",
        "revision": "a hub model must stay the same",
        "dtype": "an accelerator has room for float32, or has no bfloat16",
        "weight": "one of several teachers shall count more; at 0 it is only measured",
        "layer_map": "layers at the same relative depth are not the ones to match",
        "control": "the question is whether the teacher's cache helps, or any pull would",
    },
    "student": {
        "path": "always, unless `geometry` is given",
        "revision": "a hub model must stay the same",
        "geometry": "the student starts from random weights",
        "tokenizer": "the student's directory has none, or there is no directory",
        "dtype": "bfloat16 gives trouble",
        "remat": "memory runs out: `dots` first, then `full` (slower)",
    },
    "projector": {
        "kind": "a plainer map is to be tried: `linear` is the baseline",
        "direction": "reproducing the original (`teacher_to_student`); else leave it",
        "mlp_ratio": "the elastic map is too small; see [hyper-parameters](hyperparameters.md)",
        "dropout": "the projector overfits: held-out cosine below training cosine",
        "init": "`calibrated`: start from a fitted map (needs `kind=linear`, `per_layer=true`)",
        "per_layer": "layers differ much; costs as many projectors as there are layers",
        "training": "no pull by a projector that knows nothing yet: `warmup`",
        "warmup_steps": "the cosine still rises fast when the student joins in",
    },
    "loss": {
        "kv": "another measure is to be tried; see [theory](theory.md#losses)",
        "kv_weight": "**first of all**: too strong a pull harms; lower it, or let it fade",
        "parts": "keys and values are to be told apart",
        "alpha": "hardly ever: `kv_weight` does the same for both terms",
        "beta": "the magnitude ratio leaves 0.5 to 2 (raise), or `mag_loss` exceeds 1 (lower); "
        "[off](alignment.md#lengths) behind a norm",
        "mercator_weight": "`kv=hybrid`; a ramp moves from one term to the other",
        "mse_weight": "`kv=hybrid`",
        "attention_weight": "`kv=structural`",
        "ce_weight": "0 to see what KV does alone; a ramp from 0 lets KV go first",
        "kl_weight": "logit KL is wanted, alone or with KV; the whole teacher is loaded then",
        "kl_temperature": "the teacher is very sure of itself: raise it",
        "key_space": "reproducing work that compares keys after RoPE",
        "sink_tokens": "prompts begin with a long common header: raise it",
        "remove_key_bias": "keys carry a bias (Qwen2) and the shuffled cosine is high",
        "center": "the shuffled cosine is high: take out what all tokens share",
        "per_head": "heads of the two models shall not be matched one by one",
    },
    "calibration": {
        "rows": "the fit's held-out R² is low (more), or fitting takes long (fewer)",
        "layers": "one source layer is enough, or none is",
        "ridge": "the program asks for it, or R² is negative: raise it",
    },
    "data": {
        "path": "always",
        "subset": "the hub data set has several configurations (`main` for openai/gsm8k)",
        "revision": "a hub data set must stay the same",
        "split": "the rows to train on are not called `train`",
        "eval_path": "held-out rows are in a file of their own: the best way",
        "eval_split": "held-out rows are another split of the same source",
        "eval_rows": "held-out figures are noisy (more) or slow (fewer)",
        "rows": "a short try on part of the data",
        "prompt_field": "your field has another name",
        "answer_field": "your field has another name",
        "messages_field": "rows are conversations; goes with `format=chat`",
        "separator": "a text file uses another one",
        "format": "`chat` for an instruct model, `template` for your own prompt",
        "train_on": "conversations have several replies and all of them are worth learning",
        "template": "`format=template`",
        "max_length": "rows are truncated (the first lines of a run say how many)",
        "batching": "much is padding (the first lines of a run say how much): `bucketed`",
        "bucket": "many lengths are compiled (raise) or much is padding (lower)",
        "batch_size": "memory or noise asks for it; a multiple of devices x `grad_accumulation`",
    },
    "optimizer": {
        "student_lr": "the loss swings (lower) or hardly moves (raise); fresh weights want 1e-3",
        "projector_lr": "the direction loss oscillates (lower)",
        "weight_decay": "hardly ever",
        "clip_norm": "gradient norms are mostly above it",
        "b1": "hardly ever",
        "b2": "small batches: 0.95 to 0.99",
        "mean_dtype": "memory is missing: `bfloat16` saves 2 bytes a parameter",
        "warmup_steps": "the first steps are rough",
        "schedule": "the run's length is not known yet: `constant`",
        "final_lr_share": "the run is to be continued by another",
    },
    "train": {
        "steps": "always; one epoch is rows / batch_size steps",
        "grad_accumulation": "a batch does not fit into memory",
        "attention": "a kernel gives trouble (`xla`), or its absence is to be an error (others)",
        "log_every": "lines come too fast or too slowly",
        "eval_every": "the course on held-out rows is wanted, and `best` checkpoints",
        "diagnose_every": "probes cost too much (see `probe_share_of_time`)",
        "checkpoint_every": "the machine may be taken away: lower it",
        "checkpoint_minutes": "steps take long, or their time varies",
        "most_skipped": "numbers overflow now and then and recover (raise)",
        "keep_checkpoints": "disk runs out, or older ones are wanted",
    },
    "eval": {
        "exact_match": "answers have no final number, or generating takes too long",
        "exact_match_every": "a curve of exact match is wanted",
        "max_new_tokens": "answers are cut off (raise) or all short (lower: faster)",
        "batch_size": "generation runs out of memory",
        "sets": "what is forgotten or carried over is to be measured",
    },
    "sets": {
        "path": "always",
        "split": "the rows are in another split than `data.eval_split`",
        "rows": "figures are noisy (more) or slow (fewer)",
    },
    "profile": {
        "steps": "steps are slower than they should be",
    },
    "mesh": {
        "data": "several devices, and the models fit on one",
        "fsdp": "the models do not fit on one device: `data: 1, fsdp: -1`",
        "indivisible": "heads or widths do not divide: `replicate` repeats them, and says so",
        "tensor": "a single layer is too large, or the batch too small to split",
    },
}
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def sections() -> dict[str, type[BaseModel]]:
    """Every section of the config by its name; ``top`` holds the fields that are no section."""
    found: dict[str, type[BaseModel]] = {"top": Config}
    for name, field in Config.model_fields.items():
        if inner := _models(field.annotation):
            found[name] = inner[0]
    found["sets"] = _models(found["eval"].model_fields["sets"].annotation)[0]
    return found


def table(section: str) -> str:
    """The Markdown table of one section."""
    fields = _own_fields(section)
    if wrong := set(fields) ^ set(WHEN[section]):
        raise SystemExit(f"WHEN[{section!r}] and kava_jax/config/run.py differ in {sorted(wrong)}")
    heads = ("field", "value", "default", "meaning", "touch it when")
    rows = [heads, ("---",) * len(heads)]
    for name, field in fields.items():
        if not field.description:
            raise SystemExit(f"{section}.{name} has no description in kava_jax/config/run.py")
        meaning = field.description.replace("<", "&lt;")  # else taken for a tag
        when = WHEN[section][name]
        rows.append((f"`{name}`", _value(field), _default(field), meaning, when))
    # A bar inside a cell, even in code, would end it.
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def filled(page: str) -> str:
    """The page with every table between its markers written anew."""

    def one(match: re.Match[str]) -> str:
        return f"<!-- config:{match[1]} -->\n{table(match[1])}\n<!-- /config:{match[1]} -->"

    return re.sub(r"<!-- config:(\w+) -->\n(.*?)<!-- /config:\1 -->", one, page, flags=re.S)


def _own_fields(section: str) -> dict[str, FieldInfo]:
    fields = sections()[section].model_fields
    return {n: f for n, f in fields.items() if section != "top" or not _models(f.annotation)}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Sections inside an annotation; the forms of a weight are values, not sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation.__name__ in ("Ramp", "AutoShare") else [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _value(field: FieldInfo) -> str:
    """Type and range in words."""
    words = _type(field.annotation)
    limits = []
    for item in field.metadata:
        limits += [w.format(f"{getattr(item, k):g}") for k, w in BOUNDS.items() if hasattr(item, k)]
    return f"{words}, {' and '.join(limits)}" if limits else words


def _type(annotation: Any) -> str:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is types.NoneType:
        return "null"
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in inside)
    if origin is typing.Annotated:
        limits = [
            word.format(f"{getattr(item, key):g}")
            for mark in inside[1:]
            for item in getattr(mark, "metadata", [mark])
            for key, word in BOUNDS.items()
            if hasattr(item, key)
        ]
        return " ".join([_type(inside[0]), *limits])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in inside)
    if origin is tuple:
        return "list of [teacher, student] pairs"
    if origin is dict:
        return "mapping"
    names = {"Ramp": "ramp", "AutoShare": "share", "str": "text", "int": "whole number"}
    names |= {"bool": "true or false", "float": "number"}
    return names[annotation.__name__]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(table(sys.argv[1]))
    else:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
