"""``kava ablate``: every arm of a grid with every seed, each an ordinary ``kava train`` of its own.

Runs are processes, so none can disturb another one, and a killed grid is called again: finished
runs are not repeated and a half-done one goes on from its checkpoint. With several jobs each gets
its own share of the CPU cores. Left out on purpose: what the results mean (``statistics``).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import IO, Any, NamedTuple

import yaml

from kava_jax.config_file import dump_config
from kava_jax.errors import KavaError, PreemptedError
from kava_jax.experiments.grid import PRETRAINED, Grid, exported, run_config, run_directory
from kava_jax.experiments.outcome import outcome_of
from kava_jax.training.lock import exclusive
from kava_jax.training.manifest import config_hash, versions, write_atomically

GRID_NAME, BAD_INPUT = "grid.json", 2
# glibc hands XLA's buffers back to the system after every step and fetches them anew, page by page:
# a fifth to a third of the time of a small model's step. This keeps them.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
# Runs of one arm differ in their seed alone: what compiles fast is worth keeping too.
KEEP_COMPILED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


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
    """A grid, the base config as it stands in its file, and the directory of its results.

    ``out`` gets one small record per arm, ``<arm>.json``, and ``grid.json``; these are all that a
    later call needs to know what is finished, so they can be committed and gone on from. The runs
    themselves are in ``out/runs``.
    """

    grid: Grid
    base: dict[str, Any]
    out: Path
    processes: "_Processes" = field(default_factory=lambda: _Processes(), init=False)

    def run(self, jobs: int, say: Callable[[Progress], None]) -> list[Job]:
        """Run what is not finished, ``jobs`` at a time; returns the runs that failed.

        Raises:
            KavaError: ``jobs`` is not positive, the directory holds results of something else or is
                another call's at this moment, or a run was refused for bad input (its own words).
        """
        if jobs < 1:
            raise KavaError(f"jobs={jobs} is not positive; use 1 or more")
        with exclusive(self.out, "out"):
            return self._run(jobs, say)

    def _run(self, jobs: int, say: Callable[[Progress], None]) -> list[Job]:
        # Seed by seed, so that a grid that is cut short has whole comparisons.
        wanted = [Job(arm, seed) for seed in self.grid.seeds for arm in self.grid.arms]
        known = [job for job in wanted if self._known(job)]
        self._write_grid()
        missing = [job for job in wanted if job not in known]
        first = []
        if self.grid.pretrain is not None:
            first = [Job(PRETRAINED, seed) for seed in dict.fromkeys(job.seed for job in missing)]
        counted = _Count(len(first) + len(wanted), say)
        for job in known:
            counted.tell(job, "known")
        return self._all(first, jobs, counted) or self._all(missing, jobs, counted)

    def _all(self, jobs: Sequence[Job], workers: int, counted: "_Count") -> list[Job]:
        shares: Queue[set[int] | None] = Queue()
        for share in _cores(workers):
            shares.put(share)
        records, failed = Lock(), []

        def one(job: Job) -> None:
            share = shares.get()
            try:
                code = self._finish(job, share)
            finally:
                shares.put(share)
            with records:
                if self.processes.ended:
                    return
                if code:
                    failed.append(job)
                elif job.arm != PRETRAINED:
                    self._keep(job)
                counted.tell(job, "failed" if code else "finished")

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:  # at a terminal the runs hear Ctrl-C too, else only this does
                self.processes.end()
                raise
            finally:  # a run that is refused ends the grid: what waits shall not start
                pool.shutdown(cancel_futures=True)
        return failed

    def _finish(self, job: Job, cores: set[int] | None) -> int:
        """Run it to its end; returns the exit code.

        Raises KavaError with the run's own words when it was refused for bad input.
        """
        config = dump_config(run_config(self.grid, self.base, *job, self.out))
        path = self.out / "configs" / f"{job.arm}-{job.seed}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        target = exported(self.out, job.seed)
        code = self._call(["train", str(path)], job, cores)
        if code == 0 and job.arm == PRETRAINED and not target.is_dir():
            directory = run_directory(self.out, *job)
            code = self._call(["export", str(directory), "--out", str(target)], job, cores)
        if code == BAD_INPUT:
            raise KavaError(f"arms.{job.arm}, seed {job.seed}: {_last_line(self._log(job))}")
        return code

    def _call(self, arguments: list[str], job: Job, cores: set[int] | None) -> int:
        """A ``kava`` command in a process of its own, with its words in the run's log."""
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as words:
            return self.processes.call(
                [sys.executable, "-m", "kava_jax", *arguments],
                words,
                cores,
                {
                    **KEEP_MEMORY,
                    **KEEP_COMPILED,
                    "SOURCE_DATE_EPOCH": str(self._started()),
                    **os.environ,
                },
            )

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job.arm}-{job.seed}.txt"

    def _identity(self, job: Job) -> str:
        """What a record belongs to: all that the files say of the run."""
        of_all = {"base": self.base, "set": self.grid.set, "pretrain": self.grid.pretrain}
        return config_hash(of_all | {"arm": self.grid.arms[job.arm], "seed": job.seed})

    def _known(self, job: Job) -> bool:
        """Whether the run's record is there.

        Raises KavaError when a record of that name is of something else.
        """
        record = read_arm(self.out, job.arm).get(job.seed)
        if record is not None and record["identity"] != self._identity(job):
            raise KavaError(
                f"arms.{job.arm}: {self.out / job.arm}.json was made by another grid file; put the "
                f"file back as it was, or name another --out"
            )
        return record is not None

    def _keep(self, job: Job) -> None:
        """Add the finished run to its arm's record."""
        found = outcome_of(run_directory(self.out, *job), job.seed, self._identity(job))
        runs = read_arm(self.out, job.arm)
        runs[job.seed] = found._asdict()
        content = {"arm": job.arm, "fields": self.grid.arms[job.arm]}
        ordered = [runs[seed] for seed in sorted(runs)]
        _write_json(self.out / f"{job.arm}.json", content | {"runs": ordered})

    def _write_grid(self) -> None:
        content = {"grid": self.grid.model_dump(mode="json"), "base": self.base}
        content |= {"started": self._started(), "versions": versions()}
        _write_json(self.out / GRID_NAME, content)

    def _started(self) -> int:
        """When the grid was first called, in seconds since 1970.

        All its runs take this for the current time, so that a chat template that writes the date
        writes the same rows for every arm and seed, however many days they take.
        """
        path = self.out / GRID_NAME
        try:
            return json.loads(path.read_text(encoding="utf-8"))["started"]
        except (OSError, ValueError, KeyError, TypeError):
            return int(time.time())


def read_arm(out: Path, arm: str) -> dict[int, dict[str, Any]]:
    """The records of an arm's finished runs, by seed; none when there is no file."""
    path = out / f"{arm}.json"
    if not path.is_file():
        return {}
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return {run["seed"]: run for run in runs}
    except (ValueError, KeyError, TypeError):
        raise KavaError(f"{path} is no record of an arm; restore it or remove it") from None


class _Processes:
    """The commands under way, so that they end with the grid."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._starting, self.ended = Lock(), False

    def call(
        self,
        command: list[str],
        words: IO[str],
        cores: set[int] | None,
        environment: dict[str, str],
    ) -> int:
        """The command's exit code, when it has ended."""
        with self._starting:
            if self.ended:
                return PreemptedError.exit_code
            process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
            self._running.add(process)
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        code = process.wait()
        self._running.discard(process)
        return code

    def end(self) -> None:
        """Ask all to save and end, and start no other."""
        with self._starting:
            self.ended = True
        for process in list(self._running):
            process.terminate()


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


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
