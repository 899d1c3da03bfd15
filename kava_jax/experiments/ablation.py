"""``kava ablate``: every arm of a grid with every seed, each an ordinary ``kava train`` of its own.

Runs are processes, so none can disturb another one, and a killed grid is called again: finished
runs are not repeated and a half-done one goes on from its checkpoint. With several jobs each gets
its own share of the CPU cores. Left out on purpose: what the results mean (``comparison``).
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import IO, Any, NamedTuple

import yaml

from kava_jax.config.file import dump_config
from kava_jax.errors import KavaError, PreemptedError
from kava_jax.experiments.grid import PRETRAINED, Grid, exported, run_config, run_directory
from kava_jax.experiments.results import GRID_NAME, RUNS_NAME, outcome_of, read_runs, write_runs
from kava_jax.journal.lock import exclusive
from kava_jax.journal.manifest import config_hash, versions, write_atomically

BAD_INPUT = 2
# glibc hands XLA's buffers back to the system after every step and fetches them anew, page by page:
# a fifth to a third of the time of a small model's step. This keeps them.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
# Runs of one arm differ in their seed alone: what compiles fast is worth keeping too.
KEEP_COMPILED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


class Job(NamedTuple):
    """One run of the grid."""

    arm: str
    seed: int


@dataclass(frozen=True)
class Ablation:
    """A grid, the base config as it stands in its file, and the directory of its results.

    It gets ``grid.json`` and ``runs.jsonl``, all that a later call needs to go on, and ``runs/``.
    """

    grid: Grid
    base: dict[str, Any]
    out: Path
    processes: "_Processes" = field(default_factory=lambda: _Processes(), init=False)

    def run(self, jobs: int, say: Callable[[str], None]) -> list[Job]:
        """Run what is not finished, ``jobs`` at a time; returns the runs that failed.

        ``say`` is told of every run whether it is known (finished before), finished or failed.
        Raises KavaError: ``jobs`` is not positive, the directory holds results of something else or
        is another call's at this moment, or a run was refused for bad input (its own words).
        """
        if jobs < 1:
            raise KavaError(f"jobs={jobs} is not positive; use 1 or more")
        with exclusive(self.out, "out"):
            return self._run(jobs, say)

    def _run(self, jobs: int, say: Callable[[str], None]) -> list[Job]:
        # Seed by seed, so that a grid that is cut short has whole comparisons.
        wanted = [Job(arm, seed) for seed in self.grid.seeds for arm in self.grid.arms]
        known = [job for job in wanted if self._known(job)]
        self._write_grid()
        missing = [job for job in wanted if job not in known]
        seeds = dict.fromkeys(job.seed for job in missing if self.grid.pretrain is not None)
        first, places = [Job(PRETRAINED, seed) for seed in seeds], itertools.count(1)

        def tell(job: Job, word: str) -> None:
            of = len(first) + len(wanted)
            say(f"{next(places)}/{of}  {job.arm} seed {job.seed}: {word}")

        for job in known:
            tell(job, "known")
        return self._all(first, jobs, tell) or self._all(missing, jobs, tell)

    def _all(
        self, jobs: Sequence[Job], workers: int, tell: Callable[[Job, str], None]
    ) -> list[Job]:
        # Several jobs each get their share of the cores, where the system has such a thing.
        shares: Queue[set[int]] = Queue()
        can = workers > 1 and hasattr(os, "sched_getaffinity")
        cores = sorted(os.sched_getaffinity(0)) if can else []
        for worker in range(workers):
            shares.put(set(cores[worker::workers]))
        failed = []

        def one(job: Job) -> int:
            share = shares.get()
            try:
                return self._finish(job, share)
            finally:
                shares.put(share)

        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(one, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    job, code = futures[future], future.result()
                    if code:
                        failed.append(job)
                    elif job.arm != PRETRAINED:
                        self._keep(job)
                    tell(job, "failed" if code else "finished")
            except KeyboardInterrupt:  # at a terminal the runs hear Ctrl-C too, else only this does
                self.processes.end()
                raise
            finally:  # a run that is refused ends the grid: what waits shall not start
                pool.shutdown(cancel_futures=True)
        return failed

    def _finish(self, job: Job, cores: set[int]) -> int:
        """Run it to its end; returns the exit code, and raises KavaError for bad input."""
        config = dump_config(run_config(self.grid, self.base, *job, self.out))
        path = self.out / "configs" / f"{job.arm}-{job.seed}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        log, target = self.out / "logs" / f"{job.arm}-{job.seed}.txt", exported(self.out, job.seed)
        code = self._call(["train", str(path)], log, cores)
        if code == 0 and job.arm == PRETRAINED and not target.is_dir():
            directory = run_directory(self.out, *job)
            code = self._call(["export", str(directory), "--out", str(target)], log, cores)
        if code == BAD_INPUT:
            *_, said = ["it said nothing", *log.read_text("utf-8").strip().splitlines()]
            raise KavaError(f"arms.{job.arm}, seed {job.seed}: {said.removeprefix('error: ')}")
        return code

    def _call(self, arguments: list[str], log: Path, cores: set[int]) -> int:
        """A ``kava`` command in a process of its own, with its words in the run's log."""
        log.parent.mkdir(parents=True, exist_ok=True)
        # A chat template that writes the date writes the same rows for every arm and seed, however
        # many days they take.
        today = {"SOURCE_DATE_EPOCH": str(self._started())}
        with log.open("a", encoding="utf-8") as words:
            command = [sys.executable, "-m", "kava_jax", *arguments]
            environment = {**KEEP_MEMORY, **KEEP_COMPILED, **today, **os.environ}
            return self.processes.call(command, words, cores, environment)

    def _identity(self, job: Job) -> str:
        """What a run belongs to: all that the files say of it."""
        of_all = {"base": self.base, "set": self.grid.set, "pretrain": self.grid.pretrain}
        return config_hash(of_all | {"arm": self.grid.arms[job.arm], "seed": job.seed})

    def _known(self, job: Job) -> bool:
        """Whether the table has the run; KavaError when it has one of something else."""
        run = read_runs(self.out).get(job)
        if run is not None and run.identity != self._identity(job):
            raise KavaError(
                f"arms.{job.arm}: {self.out / RUNS_NAME} was made by another grid file; put the "
                f"file back as it was, or name another --out"
            )
        return run is not None

    def _keep(self, job: Job) -> None:
        """Add the finished run to the table."""
        found = outcome_of(run_directory(self.out, *job), *job, self._identity(job))
        write_runs(self.out, (read_runs(self.out) | {job: found}).values())

    def _write_grid(self) -> None:
        content = {"grid": self.grid.model_dump(mode="json"), "base": self.base}
        content |= {"started": self._started(), "versions": versions()}
        write_atomically(self.out / GRID_NAME, json.dumps(content, indent=1) + "\n")

    def _started(self) -> int:
        """When the grid was first called, in seconds since 1970: the current time of all runs."""
        try:
            return json.loads((self.out / GRID_NAME).read_text(encoding="utf-8"))["started"]
        except (OSError, ValueError, KeyError, TypeError):
            return int(time.time())


class _Processes:
    """The commands under way, so that they end with the grid."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._starting, self._ended = Lock(), False

    def call(
        self, command: list[str], words: IO[str], cores: set[int], environment: dict[str, str]
    ) -> int:
        """The command's exit code, when it has ended."""
        with self._starting:
            if self._ended:
                return PreemptedError.exit_code
            process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
            self._running.add(process)
        if cores:
            os.sched_setaffinity(process.pid, cores)
        code = process.wait()
        self._running.discard(process)
        return code

    def end(self) -> None:
        """Ask all to save and end, and start no other."""
        with self._starting:
            self._ended = True
        for process in list(self._running):
            process.terminate()
