"""``kava ablate``: every arm of a grid with every seed, each an ordinary ``kava train`` of its own.

Runs are processes, so none can disturb another one, and a killed grid is called again: finished
runs are not repeated and a half-done one goes on from its checkpoint. With several jobs each gets
its own share of the CPU cores. Left out on purpose: what the results mean (``statistics``).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import yaml

from kava_jax.config_file import dump_config
from kava_jax.errors import KavaError
from kava_jax.experiments.grid import PRETRAINED, Grid, exported, run_config, run_directory
from kava_jax.experiments.outcome import Outcome, outcome_of
from kava_jax.training.manifest import config_diff, config_hash, versions

GRID_NAME, LOG_NAME, CACHE_NAME = "grid.json", "log.txt", "compiled"
# glibc hands XLA's buffers back to the system after every step and fetches them anew, page by page:
# a fifth to a third of the time of a small model's step. This keeps them.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}


class Job(NamedTuple):
    """One run of the grid."""

    arm: str
    seed: int


class Progress(NamedTuple):
    """What became of one run: ``finished``, ``failed`` or ``known`` (finished before)."""

    job: Job
    word: str
    done: int
    of: int


@dataclass(frozen=True)
class Ablation:
    """A grid, the base config as it stands in its file, and the directory of its runs."""

    grid: Grid
    base: dict[str, Any]
    out: Path

    def run(self, jobs: int, say: Callable[[Progress], None]) -> list[Job]:
        """Run what is not finished, ``jobs`` at a time; returns the runs that failed.

        Writes one record per arm, ``<arm>.json``, as soon as a run of it ends, and ``grid.json``.

        Raises:
            KavaError: ``jobs`` is not positive, the directory holds another grid, or a run was
                refused for bad input (its own words).
        """
        if jobs < 1:
            raise KavaError(f"jobs={jobs} is not positive; use 1 or more")
        self._write_grid()
        seeds, arms = self.grid.seeds, self.grid.arms
        first = [Job(PRETRAINED, seed) for seed in seeds] if self.grid.pretrain is not None else []
        # Seed by seed, so that a grid that is cut short has whole comparisons.
        rest = [Job(arm, seed) for seed in seeds for arm in arms]
        counted = _Count(len(first) + len(rest), say)
        failed = self._all(first, jobs, counted)
        if failed:
            return failed
        return self._all(rest, jobs, counted)

    def _all(self, jobs: Sequence[Job], workers: int, counted: "_Count") -> list[Job]:
        shares: Queue[set[int] | None] = Queue()
        for share in _cores(workers):
            shares.put(share)

        def one(job: Job) -> str:
            share = shares.get()
            try:
                word = self._finish(job, share)
            finally:
                shares.put(share)
            counted.tell(job, word)
            return word

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, job) for job in jobs]
            try:
                words = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for arm in dict.fromkeys(job.arm for job in jobs if job.arm != PRETRAINED):
            self._write_arm(arm)
        return [job for job, word in zip(jobs, words, strict=True) if word == "failed"]

    def _finish(self, job: Job, cores: set[int] | None) -> str:
        """Run it, unless its record is there."""
        if self._record_of(job) is not None:
            return "known"
        directory = run_directory(self.out, *job)
        code = self._train(job, cores)
        if code == 0 and job.arm == PRETRAINED:
            code = self._call(
                ["export", str(directory), "--out", str(exported(self.out, job.seed))], job, cores
            )
        if code == 2:
            raise KavaError(f"arms.{job.arm}, seed {job.seed}: {_last_line(self._log(job))}")
        if code != 0:
            return "failed"
        if job.arm == PRETRAINED:
            record: Any = {"config_hash": self._hash(job)}
        else:
            record = {
                "config_hash": self._hash(job),
                "outcome": outcome_of(directory, job.seed)._asdict(),
            }
        _write_json(_record_path(directory), record)
        return "finished"

    def _train(self, job: Job, cores: set[int] | None) -> int:
        config = dump_config(run_config(self.grid, self.base, *job, self.out))
        path = self.out / "configs" / f"{job.arm}-{job.seed}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return self._call(["train", str(path)], job, cores)

    def _call(self, arguments: list[str], job: Job, cores: set[int] | None) -> int:
        """A ``kava`` command in a process of its own, with its words in the run's log."""
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **KEEP_MEMORY,
            "JAX_COMPILATION_CACHE_DIR": str((self.out / CACHE_NAME).resolve()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            **os.environ,
        }
        with log.open("a", encoding="utf-8") as words:
            process = subprocess.Popen(
                [sys.executable, "-m", "kava_jax", *arguments],
                stdout=words,
                stderr=words,
                env=environment,
            )
            if cores is not None:
                os.sched_setaffinity(process.pid, cores)
            try:
                return process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job.arm}-{job.seed}.txt"

    def _hash(self, job: Job) -> str:
        return config_hash(dump_config(run_config(self.grid, self.base, *job, self.out)))

    def _record_of(self, job: Job) -> dict[str, Any] | None:
        path = _record_path(run_directory(self.out, *job))
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["config_hash"] != self._hash(job):
            raise KavaError(
                f"arms.{job.arm}: {path.parent} was made with another config; put the arm back as "
                f"it was, or remove that directory to run it again"
            )
        return record

    def _write_arm(self, arm: str) -> None:
        """All records of an arm in one file."""
        records = [self._record_of(Job(arm, seed)) for seed in self.grid.seeds]
        outcomes = [Outcome(**record["outcome"]) for record in records if record]
        if not outcomes:
            return
        content = {"arm": arm, "fields": self.grid.arms[arm], "runs": outcomes}
        _write_json(self.out / f"{arm}.json", content | {"runs": [o._asdict() for o in outcomes]})

    def _write_grid(self) -> None:
        path = self.out / GRID_NAME
        content = {
            "grid": self.grid.model_dump(mode="json"),
            "base": self.base,
            "versions": versions(),
        }
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            free = ("grid.arms", "grid.seeds", "versions")
            if changes := config_diff(known, content, free):
                raise KavaError(
                    f"out={self.out} holds another grid: {', '.join(map(str, changes[:3]))}; name "
                    f"another --out"
                )
        _write_json(path, content)


class _Count:
    def __init__(self, of: int, say: Callable[[Progress], None]):
        self._done, self._of, self._say = 0, of, say

    def tell(self, job: Job, word: str) -> None:
        self._done += 1
        self._say(Progress(job, word, self._done, self._of))


def _cores(jobs: int) -> list[set[int] | None]:
    """Each job's share of the cores; None where the system has no such thing or it is one job."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[job::jobs]) or set(cores) for job in range(jobs)]


def _record_path(directory: Path) -> Path:
    return directory / "outcome.json"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
