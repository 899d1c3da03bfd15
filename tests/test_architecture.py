"""The plan of the house: imports point one way, and importing anything costs and starts nothing."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kava_jax"

# Every room may import the rooms before it and itself. The package's own __init__ stands outside:
# it only passes public names on.
ROOMS = (
    "errors",
    "storage",
    "cache",
    "geometry",
    "losses",
    "diagnostics",
    "parallel",
    "data",
    "models",
    "alignment",
    "training",
    "hf",
    "config",
    "evaluation",
    "journal",
    "verify",
    "runs",
    "experiments",
    "plan",
    "bench",
    "demo",
    "cli",
)
NOT_A_NAME = {"utils", "util", "common", "helpers", "misc", "core", "manager"}
# Slow to import, and needed by a few commands only: imported inside the functions that use them.
HEAVY = ("transformers", "datasets", "matplotlib", "tensorboardX", "torch")

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path):
    """Full names of everything of ours a file imports, inside functions too."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_module_has_its_place():
    rooms = {room(module_name(path)) for path in MODULES if path.parent != PACKAGE} | {
        path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")
    }
    assert rooms <= set(ROOMS), f"give {sorted(rooms - set(ROOMS))} a place in ROOMS"


def test_imports_point_one_way():
    wrong = []
    for path in MODULES:
        if path.parent == PACKAGE and path.stem in ("__init__", "__main__"):
            continue
        own = ROOMS.index(room(module_name(path)))
        for name in imported(path):
            if not name.startswith("kava_jax."):
                continue
            # `from kava_jax import X` with a public name X hides the room it comes from.
            if room(name) not in ROOMS or ROOMS.index(room(name)) > own:
                wrong.append(f"{path.relative_to(PACKAGE.parent)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_below_the_runs_nothing_knows_the_config():
    """Functions take plain values; the config is turned into them in one room."""
    below = ROOMS[: ROOMS.index("runs")]
    wrong = [
        f"{path.relative_to(PACKAGE.parent)} imports {name}"
        for path in MODULES
        if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
        if room(module_name(path)) in set(below) - {"config"}
        for name in imported(path)
        if name.startswith("kava_jax.config")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_import_reader_sees_every_spelling(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "kava_jax")
    path = tmp_path / "kava_jax" / "data" / "sources.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import kava_jax.cli\nfrom kava_jax.hf import load\nfrom kava_jax import demo\n"
        "from . import batches\nfrom ..training import loop\n"
        "def f():\n    from .batches import make\n"
    )
    assert list(imported(path)) == [
        "kava_jax.cli",
        "kava_jax.hf.load",
        "kava_jax.demo",
        "kava_jax.data.batches",
        "kava_jax.training.loop",
        "kava_jax.data.batches.make",
    ]


def test_one_name_means_one_thing():
    """No two modules and no two classes of one name, private ones included."""
    modules = [path.parent.name if path.stem == "__init__" else path.stem for path in MODULES]
    classes = [
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert not [name for name, times in Counter(modules + classes).items() if times > 1]


def test_no_room_is_a_drawer():
    names = {part for path in MODULES for part in module_name(path).split(".")}
    assert not names & NOT_A_NAME


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_file_says_what_it_is_and_stays_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    # A room's empty __init__ has nothing to say.
    assert not text.strip() or ast.get_docstring(ast.parse(text))


def test_importing_every_module_starts_no_backend_and_loads_nothing_heavy():
    """JAX refuses to change its number of devices once a backend runs: so none does."""
    program = (
        "import importlib, sys, jax\n"
        f"for name in {[module_name(path) for path in MODULES]}:\n"
        "    importlib.import_module(name)\n"
        "    jax.config.update('jax_num_cpu_devices', 1 + jax.config.jax_num_cpu_devices % 2)\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_backend_check_would_notice_one():
    program = (
        "import jax\njax.devices()\n"
        "jax.config.update('jax_num_cpu_devices', 1 + jax.config.jax_num_cpu_devices % 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "before backends are initialized" in done.stderr
