"""The configuration: what is accepted, what is refused, and that it survives a round trip."""

import ast
import copy
import re
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from kava_jax.alignment.kv_losses import MSE, Mercator
from kava_jax.config.file import WENT, dump_config, load_config, parse_config, shipped_config
from kava_jax.config.run import Config
from kava_jax.config.weights import AutoShare, Ramp
from kava_jax.errors import KavaError
from kava_jax.runs.reopen import FREE_FIELDS, PATH_FIELDS
from tests.tiny import write_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LARGEST = 86


def least() -> dict[str, typing.Any]:
    """The shortest valid config."""
    return {"student": {"path": "student"}, "data": {"path": "data.jsonl"}}


def parse(*overrides: str) -> Config:
    return parse_config(least(), overrides)


def sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        # A ramp and a measured share stand for a number.
        return [] if annotation in (Ramp, AutoShare) else [annotation]
    return [model for part in typing.get_args(annotation) for model in sections(part)]


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        below = sections(field.annotation)
        names += [leaf for s in below for leaf in leaves(s, f"{prefix}{name}.")] or [prefix + name]
    return list(dict.fromkeys(names))  # kinds of one section share fields


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse_and_come_back(path):
    config = load_config(path)
    assert parse_config(dump_config(config)) == config
    assert shipped_config(path.name).read_text() == path.read_text()


def test_unknown_shipped_config():
    with pytest.raises(KavaError, match=r"config='none.yaml'.*give a path"):
        shipped_config("none.yaml")


def test_the_config_stays_small():
    names = leaves(Config)
    assert "teachers.layer_map" in names  # the walk goes into lists of sections
    assert "loss.kv_weight" in names
    assert "mesh.tensor" in names
    assert len(names) <= LARGEST, names


def test_free_fields_exist():
    names = leaves(Config)
    assert all(any(f"{n}.".startswith(f"{free}.") for n in names) for free in FREE_FIELDS)
    assert {path.replace(".*", "") for path in PATH_FIELDS} <= set(names)


def test_defaults_are_those_of_the_design():
    config = parse()
    assert (config.optimizer.student_lr, config.optimizer.projector_lr) == (5e-5, 1e-3)
    assert (config.loss.kv, config.loss.ce_weight) == (Mercator(beta=0.01), 1.0)
    assert (config.loss.key_space, config.loss.sink_tokens) == ("pre_rope", 4)
    assert config.projector.direction == "student_to_teacher"
    assert config.teachers == ()
    assert str(config.run.directory) == "runs/run"
    assert str(parse("run.name=b", "run.dir=null").run.directory) == "runs/b"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("2.5e+1", 25.0), (".5e-2", 5e-3), ("3", 3.0), ("0.25", 0.25)],
)
def test_numbers_as_people_write_them(text, value, tmp_path):
    assert parse(f"optimizer.student_lr={text}").optimizer.student_lr == value
    path = tmp_path / "c.yaml"
    path.write_text(f"student: {{path: s}}\ndata: {{path: d}}\noptimizer: {{student_lr: {text}}}\n")
    assert load_config(path).optimizer.student_lr == value


def test_text_that_resembles_a_number_stays_text():
    assert parse("student.path='1e-3'").student.path == "1e-3"
    assert parse("data.path=e3").data.path == "e3"
    # Numbers to the base of 60, for YAML 1.1.
    assert parse("data.path=10:15").data.path == "10:15"
    assert parse("data.path=10:15.5").data.path == "10:15.5"


def test_overrides_reach_everything():
    config = parse(
        "train.steps=7",
        "teachers.0.path=big",
        "teachers.1={name: other, path: second}",
        "teachers.1.layer_map=[[3, 0], [5, 1]]",
        "loss.kv_weight={start: 0, end: 1}",
        "train.steps=8",
        "data.eval_path=a=b",
    )
    assert config.train.steps == 8  # the last one counts
    assert [t.path for t in config.teachers] == ["big", "second"]
    assert config.teachers[1].layer_map == ((3, 0), (5, 1))
    assert config.loss.kv_weight == Ramp(start=0, end=1)
    assert config.data.eval_path == "a=b"


def test_overrides_replace_what_the_file_says(tmp_path):
    path = write_config(tmp_path / "tiny.yaml")
    config = load_config(path, ["teachers.0.weight=2"])
    assert config.teachers[0].weight == 2
    assert config.teachers[0].path == "teacher"
    assert load_config(path, ["teachers=[]"]).teachers == ()


def test_every_problem_is_named_at_once():
    with pytest.raises(KavaError) as caught:
        parse(
            "train.stesp=4", "train.log_every=0", "loss.kv=cosine", "optimiser.b1=1", "run.seed=-1"
        )
    message = str(caught.value)
    for words in (
        "did you mean train.steps?",
        "train.log_every=0 is not valid",
        "loss.kv='cosine'",
        "did you mean optimizer?",
        "run.seed=-1",
    ):
        assert words in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_a_weight_that_is_neither_number_nor_ramp_is_named_once():
    with pytest.raises(KavaError) as caught:
        parse("loss.kv_weight=heavy")
    assert "loss.kv_weight='heavy'" in str(caught.value)
    with pytest.raises(KavaError) as caught:
        parse("loss.kv_weight={start: 0, end: 1, middle: 2}")
    assert str(caught.value).startswith("loss.kv_weight.middle is not a known field; ")
    with pytest.raises(KavaError) as caught:
        parse("loss.kv_weight={share: 0}")
    assert str(caught.value).startswith("loss.kv_weight.share=0 is not valid: ")


def test_a_share_of_the_gradient_as_a_weight():
    short = parse("loss.kv_weight=auto(0.2)")
    assert short.loss.kv_weight == AutoShare(share=0.2, every=20)
    assert parse("loss.kv_weight={share: 0.2}") == short
    assert parse_config(dump_config(short)) == short
    for wrong in ("auto()", "auto(x)", "auto(0.2", "auto 0.2"):
        with pytest.raises(KavaError, match=r"write a number, auto\(0.2\)"):
            parse(f"loss.kv_weight={wrong}")
    fields = ["loss.kv_weight=auto(0.2)", "teachers.0.path=t"]
    for nothing in ("0", "{start: 0, end: 0}"):
        words = r"auto\(0.2\).*loss.ce_weight=0 and loss.kl_weight=0; .* or kv_weight a number"
        with pytest.raises(KavaError, match=words):
            parse(*fields, f"loss.ce_weight={nothing}", f"loss.kl_weight={nothing}")
    for something in ("0.5", "{start: 0, end: 1}", "{start: 1, end: 0}"):
        assert parse(*fields, f"loss.ce_weight={something}").loss.kl_weight == 0
        assert parse(*fields, "loss.ce_weight=0", f"loss.kl_weight={something}").loss.ce_weight == 0


def test_a_ramp_takes_the_run_or_a_part_of_it():
    assert parse("loss.kv_weight={start: 1, end: 0}").loss.kv_weight == Ramp(start=1, end=0, over=1)
    short = parse("loss.ce_weight={start: 0, end: 1, over: 0.2}")
    assert short.loss.ce_weight == Ramp(start=0, end=1, over=0.2)
    assert parse_config(dump_config(short)) == short
    with pytest.raises(KavaError, match=r"loss.kv_weight.over=0"):
        parse("loss.kv_weight={start: 1, end: 0, over: 0}")


def test_a_recipe_sets_what_the_config_does_not_say():
    assert parse().recipe == "anchored"
    # The defaults are the anchored recipe: saying its name changes nothing.
    assert parse("recipe=anchored") == parse()
    original = parse("recipe=original", "loss.kv.beta=0.05", "teachers.0.path=t")
    assert original.projector.direction == "teacher_to_student"
    assert original.loss.kv == Mercator(beta=0.05)
    assert original.teachers[0].layer_map is None
    chosen = parse("recipe=calibrated", "teachers.0={path: t, layer_map: null}")
    assert chosen.teachers[0].layer_map is None  # what is written wins over the recipe
    assert parse_config(dump_config(chosen)) == chosen
    both = parse(
        "recipe=calibrated", "teachers.0.path=t", "teachers.1={path: u, name: u, layer_map: last}"
    )
    assert [teacher.layer_map for teacher in both.teachers] == ["calibrated", "last"]
    assert both.projector.init == "calibrated"
    assert both.needs_calibration
    assert not original.needs_calibration
    healed = parse("recipe=healed", "loss.kv_weight=auto(0.2)", "teachers.0.path=t")
    assert (healed.loss.ce_weight, healed.loss.kl_weight) == (0.0, 1.0)
    assert healed.projector.kind == "identity"
    cut = ("recipe=healed", "student={cut: {kv_heads: 1}}", "teachers.0.path=t")
    merged = parse(*cut).projector
    assert (merged.kind, merged.init, merged.training) == ("linear", "merged", "frozen")
    assert parse(*cut, "loss.match=block_outputs").projector.kind == "identity"
    assert parse(*cut, "projector={init: xavier, training: joint}").projector.init == "xavier"
    assert healed.loss.kv_weight == AutoShare(share=0.2)
    # What is written out is read back as it was, whatever the recipe.
    for config in (both, healed):
        assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=mine"], "recipe='mine' is not valid"),
        (
            ["loss.remove_key_bias=true", "loss.key_space=post_rope"],
            "loss: remove_key_bias=true with key_space=post_rope",
        ),
        (
            ["teachers=[{path: t, weight: 0}, {path: u, name: u, weight: 0}]"],
            "no teacher has a weight above 0",
        ),
        (
            ["projector.init=calibrated"],
            "projector: init=calibrated with kind=elastic, per_layer=False",
        ),
        (
            ["projector={init: merged, kind: linear}"],
            "projector: init=merged with kind=linear, per_layer=False",
        ),
        (
            ["projector={init: merged, kind: linear, per_layer: true}"],
            "projector: init=merged with direction=student_to_teacher: heads are merged on the",
        ),
        (
            [
                "projector={init: merged, kind: linear, per_layer: true, direction: "
                "teacher_to_student}"
            ],
            "projector.init=merged with student.cut=None, loss.match=cache: it merges keys and",
        ),
        (
            ["projector.training=warmup", "train.steps=50", "teachers.0.path=t"],
            "projector.warmup_steps=100 and optimizer.warmup_steps=0 leave the student nothing",
        ),
        (["teachers.0={path: t, layer_map: nearest}"], "teachers.0.layer_map='nearest'"),
        (
            ["projector.kind=identity", "projector.training=warmup"],
            "projector: training=warmup with kind=identity, which has nothing to learn; set",
        ),
        (
            ["projector.kind=identity", "projector.init=calibrated", "projector.per_layer=true"],
            "projector: init=calibrated with kind=identity",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(KavaError) as caught:
        parse(*overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_sections_are_named():
    with pytest.raises(KavaError) as caught:
        parse_config({"student": {"path": "s"}})
    assert str(caught.value) == "data is required but missing; add it"
    with pytest.raises(KavaError, match=r"teachers\.0\.path is required but missing; add it"):
        parse("teachers.0.weight=1")


def test_an_unknown_key_without_a_near_one_gets_the_list():
    with pytest.raises(KavaError, match=r"train.colour is not a known field; the fields there are"):
        parse("train.colour=red")
    with pytest.raises(KavaError, match=r"did you mean teachers\.0\.layer_map\?"):
        parse("teachers.0={path: x, layermap: last}")


@pytest.mark.parametrize(
    ("student", "given"),
    [({}, "none"), ({"path": "s", "geometry": {"a": 1}}, "path and geometry")],
)
def test_exactly_one_origin_of_the_student(student, given):
    wanted = re.escape(f"exactly one of path, geometry and cut ({given} given)")
    with pytest.raises(KavaError, match=rf"student.*{wanted}"):
        parse_config({"student": student, "data": {"path": "d"}})


def test_the_config_is_frozen():
    config = parse()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]  (the point)


def test_round_trip_through_yaml():
    config = parse(
        "teachers.0={name: a, path: x, layer_map: [[3, 0], [5, 1]]}",
        "loss.kv_weight={start: 0, end: 1e-3}",
        "data.format='Q {prompt} A {answer}'",
        "loss.kv=hybrid",
        "data.fields=[null, text]",
        "mesh.data=2",
    )
    text = yaml.safe_dump(dump_config(config))
    assert parse_config(yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    ("overrides", "loss"),
    [
        ([], Mercator()),
        (["loss.kv=mse"], MSE()),
        (["loss.kv={kind: mse}"], MSE()),
        (["loss.kv={beta: 0.5}"], Mercator(beta=0.5)),
        (["loss.kv=mercator", "loss.kv.beta=0.5"], Mercator(beta=0.5)),
        (["loss.kv={kind: mercator, beta: 0.5}", "loss.kv=mse"], MSE()),
        (["recipe=original", "loss.kv=mse"], MSE()),
    ],
)
def test_a_kv_loss_is_a_name_or_a_kind_with_its_own_fields(overrides, loss):
    assert parse(*overrides).loss.kv == loss


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kv=cosine"], "loss.kv='cosine' is not valid: use one of 'mercator', 'mse'"),
        (["loss.kv=mse", "loss.kv.beta=1"], "loss.kv.beta is not a known field; the fields there"),
        (["loss.kv.bet=1"], "did you mean loss.kv.beta?"),
        (["loss.kv.beta=-1"], "loss.kv.beta=-1 is not valid"),
        (["data.fields=[a, b, c]"], "data.fields=['a', 'b', 'c'] is not valid: write [prompt"),
        (["data.fields=[a, null]"], "write [prompt, answer]"),
        (["data.format={{prompt}}"], "a key is a mapping or a list (quote text with braces)"),
        (["data.format=plain"], "data.format='plain' is not valid: write qa, chat, or a text with"),
    ],
)
def test_what_a_choice_cannot_be_is_said(overrides, message):
    with pytest.raises(KavaError) as caught:
        parse(*overrides)
    assert message in str(caught.value)


def test_what_became_of_the_fields_of_an_earlier_version_is_said():
    names = leaves(Config)
    for field, words in WENT.items():
        assert field not in names
        for new in re.findall(r"called ([a-z_.2]+) now", words):
            assert new in names
        with pytest.raises(KavaError, match=rf"is not a known field; {re.escape(words)}$"):
            parse("teachers.0.path=t", f"{field.replace('teachers', 'teachers.0')}=1")


def test_every_list_of_names_is_written_once():
    """Two Literals of the same names would have to be kept alike by hand."""
    seen = {}
    for path in sorted((ROOT / "kava_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
                parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else ()
                names = frozenset(ast.unparse(part) for part in parts)
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert not names or names not in seen, f"{where} repeats {seen[names]}"
                seen[names] = where
    assert len(seen) > 10


def test_overrides_leave_what_they_are_given_as_it_is():
    raw = least()
    before = copy.deepcopy(raw)
    assert parse_config(raw, ["train.steps=5", "train.attention=xla"]).train.steps == 5
    assert raw == before
