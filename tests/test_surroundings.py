"""Commands in a locale without their characters, and for a user without a home directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import CONFIG, write_config, write_model, write_rows

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
NAME = "Übung 日本"
# As it is for a user id that the system has no entry for.
NOBODY = """
import pwd
def getpwuid(number):
    raise KeyError(number)
pwd.getpwuid = getpwuid
from kava_jax.cli import main
main()
"""


def kava(place: Path, program: str, *arguments: str, **environment: str):
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    kept |= {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=place,
        env=kept | ASCII | environment,
        capture_output=True,
        check=False,
    )


def test_verify_in_an_ascii_locale_and_without_any_home(tmp_path):
    done = kava(tmp_path, NOBODY, "verify")
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert b"99\\xb2/128" in done.stdout  # 99²/128
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_run_in_an_ascii_locale_writes_utf_8(tmp_path):
    """And where the home directory cannot hold a file."""
    write_model(tmp_path / "student")
    row = json.dumps({NAME: f"{NAME}?", "answer": f"{NAME} #### 1"}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text(24 * f"{row}\n", encoding="utf-8")
    train = {"steps": 1, "log_every": 1, "checkpoint_every": 1}
    write_config(
        tmp_path / "tiny.yaml",
        teachers=[],
        student={"path": "student", "tokenizer": "student"},
        data=CONFIG["data"] | {"fields": [NAME, "answer"]},
        train=train,
    )
    home = set(tmp_path.iterdir()) | {tmp_path / "run"}
    program = "from kava_jax.cli import main; main()"
    done = kava(tmp_path, program, "train", "tiny.yaml", HOME="/dev/null")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    written = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(written)["data"]["fields"][0] == NAME
    assert set(tmp_path.iterdir()) == home  # no folder called ~


def test_a_name_that_the_locale_cannot_write_is_one_line(tmp_path):
    name = NAME.encode()
    program = "from kava_jax.cli import main; main()"
    write_model(tmp_path / "student")
    write_rows(tmp_path / "data.jsonl", 24)
    write_config(
        tmp_path / "tiny.yaml",
        teachers=[],
        student={"path": "student", "tokenizer": "student"},
        run={"name": "tiny", "dir": NAME},
    )
    done = kava(tmp_path, program, "train", "tiny.yaml")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.decode("ascii").splitlines()
    assert line.startswith("error: ")
    assert "PYTHONUTF8=1" in line
    assert name not in done.stderr
