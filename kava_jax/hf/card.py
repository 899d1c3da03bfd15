"""The model card of an export: what was distilled from what, how, and how to do it again.

Plain values in, text out. The licence is left to the user: a student's licence follows from its
base model's, which only a person can read. Local paths are reduced to their last component, so a
card tells nothing about the machine it was written on.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence

import yaml

from kava_jax.alignment.handoff import Reader
from kava_jax.hf.locate import CUT_RECORD

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Whose prompt cache is carried over to whom, by who reads the prompt.
_HANDOFF = {
    "teacher": "It can also answer from its teacher's prompt cache",
    "student": "Its teacher can also answer from its prompt cache",
}
_PATH_START = re.compile(r"/|~|\.{1,2}/|[A-Za-z]:\\")


def model_card(
    *,
    name: str,
    base_model: str,
    teachers: Sequence[str],
    recipe: Mapping[str, object],
    metrics: Mapping[str, float | str | None],
    dataset: str,
    command: str,
    versions: Mapping[str, str],
    followed: Sequence[str] = ("attention keys and values",),
    reader: Reader | None = None,
) -> str:
    """README.md of an exported student, with Hugging Face front matter.

    Args:
        name: title of the card, usually the run's name.
        base_model: path or hub id the student started from.
        teachers: paths or hub ids of the teachers.
        recipe: what decides the result (loss, projector, steps, learning rates), name to value.
        metrics: name to value on held-out data; None is shown as a dash.
        dataset: path or hub id of the training data.
        command: the command line that made the model.
        versions: package to version.
        followed: what of the teachers the student was trained to follow.
        reader: who reads the prompt where a cache handoff was trained.
    """
    base, data = without_machine_path(base_model), without_machine_path(dataset)
    told = f"""`{base}`, trained with kava-jax on `{data}`
{_goal(teachers, followed)}.
This is an ordinary Hugging Face directory, and no special code is needed to load it. The projector
through which the two models were compared during training is not part of it.{_handoff(reader)}"""
    tables = (
        _table("setting", recipe),
        "## Measured on held-out data",
        _table("metric", metrics),
        "## Made with",
        _table("package", versions),
    )
    front = _front(base_model, dataset, ["distillation", "kv-cache"])
    follows = "it follows from the licences of the base model, the teachers and the data"
    return _page(front, name, told, command, tables, follows)


def cut_card(*, name: str, teacher: str, left: Mapping[str, object], command: str) -> str:
    """README.md of a model that was cut and not trained since.

    Args:
        name: title of the card.
        teacher: path or hub id of the model it was cut from.
        left: what is left of it and what was measured, name to value.
        command: the command line that made it.
    """
    source = without_machine_path(teacher)
    told = f"""Cut from `{source}` with kava-jax, and not trained since: it is where a
training starts. `{CUT_RECORD}` says which layer, head and unit came from where."""
    follows = "it follows from the licence of the model it was cut from"
    front = _front(teacher, None, ["pruning"])
    return _page(front, name, told, command, [_table("what", left)], follows)


def _page(
    front: str, name: str, told: str, command: str, tables: Sequence[str], licence: str
) -> str:
    """A card: what is told of a model, how it was made, and what follows."""
    made = f"## How it was made\n\n```\n{without_machine_paths(command)}\n```"
    parts = (front, f"# {name}", told, made, *tables, f"## Licence\n\nNot stated here: {licence}.")
    return "\n\n".join(parts) + "\n"


def _front(base_model: str, dataset: str | None, tags: Sequence[str]) -> str:
    """Hugging Face's front matter."""
    front: dict[str, object] = {"library_name": "transformers"}
    if is_hub_id(base_model):
        front["base_model"] = base_model
    if dataset is not None and is_hub_id(dataset):
        front["datasets"] = [dataset]
    front["tags"] = ["kava-jax", *tags, "text-generation"]
    front["pipeline_tag"] = "text-generation"
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---"


def is_hub_id(text: str) -> bool:
    """Whether a name reads as ``owner/name`` on the hub and is not a directory or file here."""
    return bool(_HUB_ID.fullmatch(text)) and not text.startswith(".") and not os.path.exists(text)


def without_machine_path(text: str) -> str:
    """A local path's last component; hub ids, ``builtin:`` names and plain words unchanged."""
    local = (
        _PATH_START.match(text)
        # A hub id has at most one slash.
        or (" " not in text and text.count("/") > 1)
        or ("/" in text and os.path.exists(text))
    )
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] if local else text


def without_machine_paths(command: str) -> str:
    """A command line with every path argument (``x`` or ``key=x``) cut to its last component."""

    def shortened(word: str) -> str:
        value = word.find("=") + 1  # the whole word where there is no key
        return word[:value] + without_machine_path(word[value:])

    return shlex.join(map(shortened, shlex.split(command)))


def _handoff(reader: str | None) -> str:
    if reader is None:
        return ""
    files = "`handoff.json` and `handoff.safetensors`, which `kava_jax.load_handoff` reads"
    return f"\n{_HANDOFF[reader]}: see {files}."


def _goal(teachers: Sequence[str], followed: Sequence[str]) -> str:
    if not teachers:
        return "by cross-entropy alone, without a teacher"
    names = ", ".join(f"`{without_machine_path(name)}`" for name in teachers)
    return f"to follow the {', '.join(followed)} of {names}" if followed else f"next to {names}"


def _table(heading: str, values: Mapping[str, object]) -> str:
    rows = [f"| {heading} | value |", "| --- | --- |"]
    for key, value in values.items():
        if isinstance(value, float):
            text = f"{value:.6g}"
        elif value is None:
            text = "-"
        else:
            text = without_machine_path(str(value)).replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {key} | {text} |")
    return "\n".join(rows)
