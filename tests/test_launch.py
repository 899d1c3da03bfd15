"""The launch script: valid shell, prints what it would run, starts again, but not on bad input."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "single_host.sh"


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_is_valid_shell() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=60)


def test_dry_run_prints_the_exact_command() -> None:
    result = _run("--dry-run", "configs/demo.yaml", "run.dir=a b")
    assert result.stdout.split() == ["kava", "train", "configs/demo.yaml", "run.dir=a\\", "b"]
    assert result.returncode == 0


def test_no_arguments_is_bad_input() -> None:
    result = _run()
    assert result.returncode == 2
    assert "CONFIG" in result.stderr


@pytest.mark.parametrize(
    ("codes", "starts", "code"), [("1 1 0", 3, 0), ("2 0", 1, 2), ("1 1 1 1", 3, 1)]
)
def test_starts_again_after_a_crash_only(
    tmp_path: Path, codes: str, starts: int, code: int
) -> None:
    fake, log = tmp_path / "kava", tmp_path / "log"
    fake.write_text(
        f'#!/usr/bin/env bash\necho "$@" >> {log}\ncodes=({codes})\n'
        f'exit "${{codes[$(wc -l < {log}) - 1]}}"\n'
    )
    fake.chmod(0o755)
    result = _run("run.yaml", KAVA=str(fake), TRIES="3")
    assert result.returncode == code
    assert log.read_text().splitlines() == ["train run.yaml"] * starts
