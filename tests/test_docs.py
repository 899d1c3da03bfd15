"""The guide says what the program does: metrics, config fields, commands, messages and links."""

import ast
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import typer
import yaml

from kava_jax.cli import run_commands, studies
from kava_jax.cli.app import app
from kava_jax.config.file import load_config, parse_config
from kava_jax.config.run import Config
from kava_jax.experiments.grid import load_grid
from kava_jax.journal.verdict import alarms, collapse_signs
from tests.tiny import write_config, write_workspace

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SETS, TEACHERS = ("more",), ("big", "other")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def fenced(path: Path, language: str) -> list[str]:
    """The contents of all fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def table_keys(text: str) -> set[str]:
    """Names in backticks in the first column of every table."""
    rows = re.findall(r"^\| *(`[^|]*)\|", text, re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


# Metrics


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Metrics of a tiny run with as much in it as goes together, in a process of its own: on one
    device it compiles in half the time.
    """
    workspace = write_workspace(tmp_path_factory.mktemp("docs"))
    teachers = [{"name": name, "path": str(workspace / "teacher")} for name in TEACHERS]
    config = write_config(
        workspace / "full.yaml",
        run={"dir": str(workspace / "run")},
        teachers=teachers,
        student={"path": str(workspace / "student")},
        projector={"kind": "linear"},  # with a norm first there is no magnitude loss
        loss={"match": "attention", "kl_weight": 0.5, "kv_weight": {"share": 0.2}},
        data={
            "path": str(workspace / "data.jsonl"),
            "eval_rows": 8,
            "max_length": 64,
            "bucket": 64,  # one shape: little is compiled
            "batch_size": 8,
        },
        train={"steps": 5, "log_every": 1, "diagnose_every": 1, "checkpoint_every": 5},
        eval={
            "max_new_tokens": 2,
            "batch_size": 8,
            "sets": {name: {"path": str(workspace / "data.jsonl"), "rows": 8} for name in SETS},
        },
    )
    program = "from kava_jax.cli import main; main()"
    command = [sys.executable, "-c", program, "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (workspace / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def bare(key: str, *, part: bool = False) -> str:
    """A metric's name as the page has it: without set, teacher, ``eval_`` and, by layer, side."""
    key = re.sub(rf"^({'|'.join(SETS)})/", "", key).removeprefix("eval_")
    key = re.sub(rf"^({'|'.join(TEACHERS)})/", "", key)
    return re.sub(r"_[kv]$", "", key) if part else key


def test_every_metric_is_explained_and_no_other(records):
    keys = {key for record in records for key in record} - {"step", "kind", "layers"}
    logged = {bare(key) for key in keys}
    logged |= {bare(k, part=True) for record in records for k in record.get("layers", {})}
    assert table_keys(page("metrics.md")) == logged


def test_the_table_of_families_is_the_code_s_own(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import family_table

    text = page("models.md")
    assert family_table.listed() in text
    assert family_table.filled(text) == text, "python docs/family_table.py writes it"


# Config


def test_every_config_field_is_in_a_list_written_from_the_models(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import config_table

    text = page("config.md")
    assert config_table.filled(text) == text, (
        "python docs/config_table.py brings the page up to date"
    )
    for name in config_table.sections():
        assert config_table.listed(name) in text, f"config.md has no list of {name}"
    fields = sections_and_fields(Config.model_json_schema())
    assert {"share", "every", "start", "end", "kv_weight", "tensor"} <= fields
    missing = [name for name in fields if not re.search(rf"(`|{{|, |## ){name}\b", text)]
    assert not missing


def sections_and_fields(schema: dict) -> set[str]:
    """Every property's name in pydantic's own schema of the config."""
    properties = [
        schema["properties"],
        *(d.get("properties", {}) for d in schema["$defs"].values()),
    ]
    return {name for each in properties for name in each}


# Commands and examples


def commands(text: str) -> list[list[str]]:
    """Every ``kava`` command of a shell block as words; comments and what is piped left out."""
    lines = text.replace("\\\n", " ").splitlines()
    called = [
        match[1] for line in lines if (match := re.match(r"(?:[A-Z_]+=\S+ )*kava (.*)", line))
    ]
    found = [shlex.split(line, comments=True) for line in called]
    ends = ("|", ">", "&&", ";")
    return [words[: next((i for i, w in enumerate(words) if w in ends), None)] for words in found]


SHELL = [
    (path.name, words)
    for path in PAGES
    for block in fenced(path, "sh")
    for words in commands(block)
]


def test_the_guide_uses_every_command():
    assert run_commands.app is studies.app is app  # both add their commands to it
    names = set(typer.main.get_command(app).commands)  # pyright: ignore  (a group)
    assert {words[0] for name, words in SHELL if name == "guide.md"} >= names - {"bench", "verify"}


def without_group_options(group, words: list[str]) -> list[str]:
    """The words from the command's name on, after options of ``kava`` itself."""
    flags = {option: param.is_flag for param in group.params for option in param.opts}
    while words[0] in flags:
        words = words[1:] if flags[words[0]] else words[2:]
    return words


@pytest.mark.parametrize(
    ("name", "words"), SHELL, ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_every_command_in_the_docs_is_one(name, words):
    group = typer.main.get_command(app)
    words = without_group_options(group, words)
    command = group.commands.get(words[0])  # pyright: ignore  (a group)
    assert command is not None, f"{name}: kava {words[0]} does not exist"
    try:
        context = command.make_context(words[0], list(words[1:]))
    except click.ClickException as error:
        pytest.fail(f"{name}: kava {' '.join(words)}: {error.format_message()}")
    config = context.params.get("config")
    if config is not None and (ROOT / config).is_file():
        load_config(ROOT / config, context.params.get("overrides") or [])


def test_every_config_and_grid_in_the_guide_is_valid(tmp_path):
    blocks = [yaml.safe_load(text) for text in fenced(DOCS / "guide.md", "yaml")]
    configs = [raw for raw in blocks if "student" in raw]
    grids = [raw for raw in blocks if "arms" in raw]
    assert configs
    assert grids
    for raw in configs:
        config = parse_config(raw)
        (tmp_path / f"{config.run.name}.yaml").write_text(yaml.safe_dump(raw))
    for raw in grids:
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(raw))
        load_grid(tmp_path / "grid.yaml")


# Messages


@cache
def messages() -> list[str]:
    """Every text in the package's code, with ``…`` where a value is filled in."""
    found = []
    for path in sorted((ROOT / "kava_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [
                part.value if isinstance(part, ast.Constant) else "…"
                for part in parts
                if isinstance(part, ast.JoinedStr | ast.FormattedValue)
                or (isinstance(part, ast.Constant) and isinstance(part.value, str))
            ]
            found.append("".join(map(str, words)))
    return [text for text in found if len(text) > 8]


def quoted() -> list[str]:
    """What troubleshooting says that the program says: what its entries begin with."""
    heads = re.findall(r"^\* `([^`]{25,})`", page("troubleshooting.md"), re.M)
    return [" ".join(head.split()).removeprefix("collapsed: ") for head in heads]


ALARMS = [
    *alarms(mag_ratio=20.0, mag_loss=9.0, dir_losses=[1.0, 0.5] * 4),
    *alarms(mag_ratio=3.0, mag_loss=0.0),
    *alarms(mag_ratio=20.0, mag_loss=None),
    *alarms(mag_ratio=3.0, mag_loss=None),
    *collapse_signs(
        {
            "cos_shuffled": 0.9,
            "alignment_gap": 0.01,
            "cos_centered": 0.0,
            "retrieval": 0.0,
            "sampled_tokens": 100,
            "student_rank": 1.0,
            "target_rank": 100.0,
        }
    ),
]


def quotes(message: str, text: str) -> bool:
    return re.fullmatch(re.escape(message).replace("…", ".+?"), text) is not None


@pytest.mark.parametrize("message", quoted(), ids=lambda message: message[:40])
def test_the_program_says_what_it_is_quoted_for(message):
    if any(quotes(message, alarm) for alarm in ALARMS):
        return  # put together from pieces; the whole is what counts
    pieces = [piece for piece in message.split("…") if len(piece.strip()) > 2]
    assert pieces
    unsaid = [piece for piece in pieces if not any(piece in text for text in messages())]
    assert not unsaid


@pytest.mark.parametrize("alarm", ALARMS)
def test_every_alarm_is_explained(alarm):
    assert len(ALARMS) == 10
    assert any(quotes(message, alarm) for message in quoted())


# Links and lines


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_both_languages_tell_the_same_story():
    english, chinese = (page(name) for name in ("concept.md", "concept.zh.md"))
    pictures = [re.findall(r"\]\((pictures/[^)]+)\)", text) for text in (english, chinese)]
    levels = [re.findall(r"^#+", text, re.M) for text in (english, chinese)]
    assert pictures[0] == pictures[1]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_lines_fit_a_screen(path):
    """A row of a table cannot be broken."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
