"""Reading a config file with dotted overrides, and writing the resolved config back.

Unknown keys are refused with the closest match, ``1e-3`` is a number (YAML 1.1 reads it as text),
a key given twice is an error (YAML keeps the last silently), and every problem is named at once.
"""

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kava_jax.config.recipes import apply_recipe
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.storage import written_out

# What became of fields that an earlier version had.
_GONE = "it went (docs/findings.md, Options that went); leave it out"
WENT = {
    "optimizer.final_lr_share": "it is called optimizer.min_lr_ratio now",
    "optimizer.mean_dtype": "it is called optimizer.mu_dtype now",
    "optimizer.schedule": "the rates follow a cosine; optimizer.min_lr_ratio=1 keeps them constant",
    "optimizer.b1": _GONE,
    "train.keep_checkpoints": "it is called train.max_to_keep now",
    "train.most_skipped": "it is called train.max_consecutive_skips now",
    "train.checkpoint_minutes": "give train.checkpoint_every a number of steps",
    "loss.beta": "it is called loss.kv.beta now",
    "loss.alpha": "loss.kv_weight weighs the direction",
    "loss.attention_weight": "loss.match=attention adds the attention term",
    "loss.mercator_weight": _GONE,
    "loss.mse_weight": _GONE,
    "loss.per_head": _GONE,
    "loss.temperature": _GONE,
    "loss.standardize": _GONE,
    "loss.divide_by_std": _GONE,
    "router": _GONE,
    "calibration": _GONE,
    "profile": "write kava train CONFIG --profile FIRST:LAST",
    "student.revision": "write it after the hub id: student.path=ID@REVISION",
    "teachers.revision": "write it after the hub id: teachers.0.path=ID@REVISION",
    "data.revision": "write it after the hub id: data.path=ID@REVISION",
    "student.dtype": "it is called train.dtype now",
    "teachers.dtype": "it is called train.dtype now",
    "data.prompt_field": "write data.fields=[prompt, answer]",
    "data.answer_field": "write data.fields=[prompt, answer]",
    "data.messages_field": "write data.fields=NAME",
    "data.template": "write the template as data.format",
    "data.separator": _GONE,
    "eval.exact_match": "eval.max_new_tokens=0 turns it off",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML with numbers like ``1e-3`` and no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a dict; a key given twice is refused, and so is one that is no text."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key is a mapping or a list (quote text with braces)",
                    problem_mark=key_node.start_mark,
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float | str:
    """A number; 10:15 is text, which YAML 1.1 takes for one to the base of 60."""
    if ":" in node.value:
        return node.value
    whole = node.tag.endswith(":int")
    return loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
# YAML 1.1 wants a dot in a float, and a sign in its exponent.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def shipped_config(name: str) -> Path:
    """Path of one of the configs that ship with the package (or lie next to it in a checkout)."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise KavaError(f"config={name!r} is not among the shipped configs; give a path to a file")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read ``path``, apply ``a.b.0.c=value`` overrides in order, validate.

    Raises KavaError in one line that lists every problem.
    """
    return parse_config(read_yaml(Path(path)), overrides)


def parse_config(raw: dict[str, Any], overrides: Iterable[str] = ()) -> Config:
    """A nested dict, which stays as it is, with overrides, validated; raises as load_config."""
    raw = copy.deepcopy(raw)
    for override in overrides:
        _apply(raw, override)
    try:
        return Config.model_validate(apply_recipe(raw))
    except ValidationError as error:
        # Once each: several members of a union may have the same problem.
        problems = dict.fromkeys(_problem(raw, dict(item)) for item in error.errors())
        raise KavaError("; ".join(problems)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; numbers and repeated keys as in a config."""
    path = Path(written_out(str(path)))
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise KavaError(f"config={str(path)!r} does not exist; give the path of a file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KavaError(
            f"config={str(path)!r} cannot be read ({error}); give a YAML file"
        ) from None
    except yaml.YAMLError as error:
        raise KavaError(f"config={str(path)!r} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise KavaError(f"config={str(path)!r} holds no sections; write 'section:' and fields")
    return raw


def dump_config(config: Config) -> dict[str, Any]:
    """The resolved config as plain data, every default written out."""
    return config.model_dump(mode="json")


def without_teachers(config: Config, **student: Any) -> dict[str, Any]:
    """The same for a run of the student alone, some of whose fields may be given."""
    raw = dump_config(config)
    # What weighs teachers, or needs them, is refused without any.
    raw["loss"] |= {"ce_weight": 1.0, "kv_weight": 1.0, "kl_weight": 0.0, "handoff": None}
    return raw | {"teachers": [], "student": raw["student"] | student}


def _one_line(error: yaml.YAMLError) -> str:
    """Problem and line number of a YAML error, without the excerpt that follows."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}); mend that line" if mark else problem


def read_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of one ``section.field=value``; raises KavaError."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise KavaError(f"override={override!r} is not of the form section.field=value")
    try:
        # YAML would read a lone dash, which names standard input, as a list of nothing.
        return key, "-" if text == "-" else yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise KavaError(
            f"override={override!r} has an unreadable value: {_one_line(error)}"
        ) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in place; a list index may be one past the end."""
    key, value = read_override(override)
    node: Any = raw
    *parents, last = parts = key.split(".")
    for position, part in enumerate(parents, start=1):
        slot = _slot(node, part, override)
        # ``loss.kv: mse`` is short for a mapping, which must be there before a field of it is set.
        short = isinstance(node[slot], str)
        if short and (model := _model_at(parts[:position])) and _kind(model):
            node[slot] = {"kind": node[slot]}
        if node[slot] is None:
            node[slot] = [] if parts[position].isdigit() else {}
        node = node[slot]
    node[_slot(node, last, override)] = value


def _slot(node: Any, part: str, override: str) -> str | int:
    """The key or the index that ``part`` stands for; null is put there where nothing is yet."""
    if isinstance(node, dict):
        node.setdefault(part, None)
        return part
    if isinstance(node, list) and part.isdigit() and int(part) <= len(node):
        if int(part) == len(node):
            node.append(None)
        return int(part)
    raise KavaError(f"override={override!r}: there is no field {part!r} to set; check the key")


def _problem(raw: Any, error: dict[str, Any]) -> str:
    """One pydantic error as 'field=value is wrong; remedy'."""
    location, value = _existing_path(raw, error["loc"])
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        went = WENT.get(re.sub(r"^teachers\.\d+", "teachers", name))
        return f"{name} is not a known field; {went or _closest(location, error['loc'][:-1])}"
    if error["type"] == "union_tag_invalid":
        return f"{name}={value!r} is not valid: use one of {error['ctx']['expected_tags']}"
    if error["type"] == "missing":
        missing = ".".join([*location, str(error["loc"][-1])])
        return f"{missing} is required but missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name}={value!r} is not valid: {message[0].lower()}{message[1:]}"


def _existing_path(raw: Any, loc: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """The part of pydantic's location that is in the input; union member names are left out."""
    names: list[str] = []
    node: Any = raw
    for part in loc:
        children: Any = dict(enumerate(node)) if isinstance(node, list) else node
        if isinstance(children, dict) and part in children:
            node = children[part]
            names.append(str(part))
    return names, node


def _closest(location: list[str], section: Sequence[int | str]) -> str:
    """'did you mean ...' among the fields of the section, or the list of them."""
    model = _model_at(section)
    fields = list(model.model_fields) if model else []
    matches = difflib.get_close_matches(location[-1], fields, n=1)
    if matches:
        return f"did you mean {'.'.join([*location[:-1], matches[0]])}?"
    return f"the fields there are {', '.join(fields)}"


def _model_at(location: Sequence[int | str]) -> type[BaseModel] | None:
    """The section at ``location``, found by walking the models' annotations.

    Of a section that may be of several kinds, the one that pydantic's location goes on to name, or
    the first.
    """
    sections: list[type[BaseModel]] = [Config]
    for part in map(str, location):
        named = [section for section in sections if _kind(section) == part]
        if named:
            sections = named
        elif sections and not part.isdigit() and part in sections[0].model_fields:
            sections = _sections_in(sections[0].model_fields[part].annotation)
    return sections[0] if sections else None


def _kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Models inside an annotation such as ``tuple[TeacherConfig, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = getattr(annotation, "__args__", ())
    return [model for argument in inner for model in _sections_in(argument)]
