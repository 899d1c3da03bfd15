"""``manifest.yaml``: what a run is, what it ran on, and what came out, for people and for resuming.

A run directory must never quietly continue another experiment. ``check_manifest`` compares what a
start is about to do with what the directory was made for, before anything is written.

Left out on purpose: computing fingerprints (the rooms that own weights and data do it), knowing
which config fields may change on resume (the caller names them), and every look at a device (the
counts are passed in, so that this module starts no backend).
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kava_jax.errors import KavaError, one_line
from kava_jax.hf.locate import CUT_RECORD
from kava_jax.journal.lock import LOCK_NAME
from kava_jax.storage import Place

CONFIG_NAME = "config.yaml"
MANIFEST_NAME = "manifest.yaml"
HEADER = "# Written by kava train. The conclusion is yours, and is kept.\n"
# The manifest of version 0.1.0, and the last commit that reads its runs (docs/findings.md,
# "Options that went").
OLD_MANIFEST_NAME = "manifest.json"
LAST_WITH_OLD_MANIFESTS = "855d6f7"
# What `kava calibrate` leaves for a run that has not started yet.
CALIBRATION_NAME = "calibration"
PACKAGES = (
    "kava-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
)


class Fingerprints(NamedTuple):
    """Hashes of what a run reads. ``None`` means "not computed", and is not compared."""

    teachers: Mapping[str, str]
    student: str | None = None
    data: str | None = None
    tokens: str | None = None


def write_config(run_dir: Place, config: Mapping[str, Any]) -> None:
    """Write the resolved config as ``config.yaml``, atomically, making the directory if need be."""
    text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
    write_atomically(run_dir / CONFIG_NAME, text)


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the config in canonical JSON: key order and tuple-or-list make no difference."""
    return hashlib.sha256(json.dumps(_plain(config), sort_keys=True).encode()).hexdigest()


def config_diff(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = ()
) -> dict[str, str]:
    """Dotted fields in which two nested configs differ, each with ``old -> new`` as JSON text.

    They are in the order of ``new``; a value that is missing is ``absent``.

    Args:
        old: the config a run directory was made with.
        new: the config of this start. List items are fields too: ``teachers.0.path``.
        free: fields that may change. A field frees everything below it, and ``*`` stands for any
            characters: ``run``, ``checkpoint.every``, ``teachers.*.path``.
    """
    before, after = fields_of(old, free), fields_of(new, free)
    return {
        field: f"{before.get(field, 'absent')} -> {after.get(field, 'absent')}"
        for field in dict.fromkeys([*after, *before])
        if before.get(field) != after.get(field)
    }


def fields_of(config: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, str]:
    """Dotted fields of a nested config and their values as JSON text, except some (``free``)."""
    return {field: value for field, value in _leaves(config) if not _matches(field, without)}


def write_manifest(
    run_dir: Place,
    *,
    command: Sequence[str],
    config: Mapping[str, Any],
    fingerprints: Fingerprints,
    today: date,
    hardware: Mapping[str, Any],
    directories: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write ``manifest.yaml``; on an existing one add this start to its list of starts.

    Only one process of a run may call this. Everything is in one file, so that a kill cannot leave
    two halves that disagree: the date of the first start (which chat templates write), a person's
    conclusion, the results, ``facts``, the run's identity (config and its hash, fingerprints) and
    ``starts``, oldest first, with what may differ from start to start (command, versions, git
    revision, hardware, time).

    Args:
        run_dir: the run directory; write ``config.yaml``, the copy to start other runs from, first.
        command: as it was called.
        config: the resolved config.
        fingerprints: of what the run reads.
        today: the date that chat templates write.
        hardware: what the caller counted: hosts, devices and their kind.
        directories: the models' paths that name local directories and no hub ids.
        facts: further sections for people.
    """
    earlier = read_manifest(run_dir) if (run_dir / MANIFEST_NAME).exists() else {}
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "versions": versions(),
        "git": _git_revision(),
        "hardware": dict(hardware),
    }
    manifest = {
        "date": str(today),
        "conclusion": earlier.get("conclusion", ""),
        "results": None,  # those of an earlier start are no longer of this run
        **(facts or {}),
        "fingerprints": fingerprints._asdict(),
        "directories": list(directories),
        "config_hash": config_hash(config),
        "config": config,
        "starts": [*earlier.get("starts", []), start],
    }
    _write(run_dir, manifest)


def write_results(run_dir: Place, results: Mapping[str, Any]) -> None:
    """Add the results of a finished run to its manifest; a person's conclusion stays."""
    _write(run_dir, read_manifest(run_dir) | {"results": results})


def _write(run_dir: Place, manifest: Mapping[str, Any]) -> None:
    text = HEADER + yaml.safe_dump(_plain(manifest), sort_keys=False, allow_unicode=True)
    write_atomically(run_dir / MANIFEST_NAME, text)


def read_manifest(run_dir: Place) -> dict[str, Any]:
    """Read ``manifest.yaml`` of a run directory; a missing or broken file is a ``KavaError``."""
    path = run_dir / MANIFEST_NAME
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        _refuse_earlier_version(run_dir)
        raise KavaError(f"{path} is missing; name a run directory made by `kava train`") from None
    # ValueError is raised for bytes that are not UTF-8.
    except (ValueError, yaml.YAMLError) as error:
        raise KavaError(
            f"{path} is not readable YAML ({one_line(error)}); correct it, restore it or name "
            f"another run.dir"
        ) from None
    if not isinstance(manifest, dict) or not {"config", "fingerprints"} <= manifest.keys():
        raise KavaError(f"{path} is no manifest of a run; restore it or name another run.dir")
    return manifest


def _refuse_earlier_version(run_dir: Place) -> None:
    """Raises KavaError for a run of the one version with that manifest and other fields."""
    if (run_dir / OLD_MANIFEST_NAME).is_file():
        raise KavaError(
            f"{run_dir} is a run of kava_jax 0.1.0, whose config and files were others; commit "
            f"{LAST_WITH_OLD_MANIFESTS} resumes, exports, evaluates and reports it"
        )


def check_manifest(
    run_dir: Place,
    *,
    config: Mapping[str, Any],
    fingerprints: Fingerprints,
    free: Sequence[str] = (),
    paths: Sequence[str] = (),
) -> dict[str, Any] | None:
    """The config that ``run_dir`` holds this very run with (None: it is fresh); writes nothing.

    Args:
        run_dir: the run directory.
        config: the config of this start.
        fingerprints: of what this start reads.
        free: fields that may differ, see ``config_diff``.
        paths: fields that say where files lie; they may differ too where both starts have
            fingerprints of all that is read there.

    Raises:
        KavaError: the directory holds something that is not a run, a run of another config (the
            changed fields are named), or this run with other teacher weights, student weights,
            data or tokenizer than it was started with.
    """
    if not (run_dir / MANIFEST_NAME).exists():
        _check_fresh(run_dir)
        return None
    manifest = read_manifest(run_dir)
    # A path may differ only where fingerprints show that what lies there does not.
    if _comparable(manifest["fingerprints"], fingerprints):
        free = [*free, *paths]
    if changes := config_diff(manifest["config"], config, free):
        raise KavaError(
            f"run.dir={run_dir} belongs to another config: {_listed(changes)};"
            " put the old values back or name another run.dir"
        )
    if changes := _fingerprint_changes(manifest["fingerprints"], fingerprints):
        raise KavaError(
            f"run.dir={run_dir} was started from other files: {_listed(changes)};"
            " restore the files or name another run.dir"
        )
    return manifest["config"]


def _check_fresh(run_dir: Place) -> None:
    """Refuse a directory that is not ours. A lone config.yaml is a start that died early."""
    _refuse_earlier_version(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise KavaError(f"run.dir={run_dir} is a file; name a directory")
    # The manifest too: the first process may be writing it while another one looks.
    ours = [Path(CONFIG_NAME), Path(MANIFEST_NAME)]
    known = {path.name for name in ours for path in (name, _temporary(name))}
    known |= {CALIBRATION_NAME, CUT_RECORD, LOCK_NAME}
    if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} - known:
        raise KavaError(
            f"run.dir={run_dir} is not empty and has no {MANIFEST_NAME}, so it is not a run;"
            " name an empty or new directory"
        )


def _comparable(old: Mapping[str, Any], new: Fingerprints) -> bool:
    """Whether both sides have fingerprints of the same models; one that is random has none."""
    same_student = bool(old["student"]) == bool(new.student)
    return same_student and old["teachers"].keys() == new.teachers.keys()


def _fingerprint_changes(old: Mapping[str, Any], new: Fingerprints) -> dict[str, str]:
    pairs = {
        "student weights": (old.get("student"), new.student),
        "data": (old.get("data"), new.data),
        "tokens of the data, or the tokenizer": (old.get("tokens"), new.tokens),
    }
    for name, value in new.teachers.items():
        pairs[f"weights of teacher {name}"] = old["teachers"].get(name), value
    return {
        # Twelve hex digits tell two hashes apart, and two whole ones would fill the line.
        what: f"{before[:12]} -> {after[:12]}"
        for what, (before, after) in pairs.items()
        if before is not None and after is not None and before != after
    }


def _listed(changes: Mapping[str, str]) -> str:
    return ", ".join(f"{what} {change}" for what, change in changes.items())


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted field and JSON text of every leaf; an empty dict or list is a leaf."""
    plain = _plain(value)
    if isinstance(plain, dict) and plain:
        items = plain.items()
    elif isinstance(plain, list) and plain:
        items = ((str(index), item) for index, item in enumerate(plain))
    else:
        yield prefix, json.dumps(plain, ensure_ascii=False)
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _matches(field: str, free: Sequence[str]) -> bool:
    return any(fnmatchcase(field, name) or fnmatchcase(field, f"{name}.*") for name in free)


def _plain(value: Any) -> Any:
    """The same value in the types YAML and JSON share, so that both round trips compare equal."""
    if isinstance(value, Mapping):
        # JSON has no keys but text, and reads back a number that was a key as text.
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.replace("kava-jax", "kava_jax")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> dict[str, str | bool] | None:
    """Revision of the current directory's repository; None without git, repository or commit."""
    # The whole hash and no tag. Untracked files do not count: a run directory in the checkout would
    # make every run dirty.
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    revision, dirty, _ = done.stdout.strip().partition("-dirty")
    return {"revision": revision, "dirty": bool(dirty)}


def write_atomically(path: Place, text: str) -> None:
    """Readers see the old file or the new one, also after a power cut, never half of one."""
    if not isinstance(path, Path):  # an object appears whole
        path.write_bytes(text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # Otherwise the rename may reach the disk before the text does, and a power cut leaves
            # an empty file under the final name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # In the same directory, because a rename is atomic only within one file system.
    return path.with_name(f".{path.name}.tmp")
