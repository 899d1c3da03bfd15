"""``kava ablate``: every arm of a grid with every seed, each an ordinary ``kava train`` of its own.

Every run is a process, so that none can disturb another. A grid that was killed can be called
again: finished runs are not repeated, and a half-done one continues from its checkpoint. With
several jobs at a time, each gets its own share of the CPU cores. What the results mean is said in
``comparison``.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kava_jax.config.file import dump_config
from kava_jax.errors import KavaError
from kava_jax.experiments.grid import PRETRAINED, Grid, exported, run_config, run_directory
from kava_jax.experiments.results import GRID_NAME, RUNS_NAME, outcome_of, read_runs, write_runs
from kava_jax.journal.lock import exclusive
from kava_jax.journal.manifest import config_hash, versions, write_atomically

BAD_INPUT = 2
# Seconds between two looks at the runs.
POLL = 0.1
# glibc hands XLA's buffers back to the system after every step and fetches them again, page by
# page: a fifth to a third of the time of a small model's step. This keeps them.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
# Runs of one arm differ in their seed alone: what compiles fast is worth keeping too.
KEEP_COMPILED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


# One run of the grid: its arm and its seed.
Job = tuple[str, int]


@dataclass(frozen=True)
class Ablation:
    """A grid, the base config as its file gives it, and the directory of the results.

    It gets ``grid.json`` and ``runs.jsonl``, all that a later call needs to go on, and ``runs/``.
    """

    grid: Grid
    base: dict[str, Any]
    out: Path

    def run(self, jobs: int, say: Callable[[str], None]) -> list[Job]:
        """Run what is not finished, ``jobs`` at a time; returns the runs that failed.

        ``say`` is told of every run whether it is known (finished before), finished or failed.
        Raises KavaError: ``jobs`` is not positive, the directory holds results of something else or
        is another call's at this moment, or a run was refused for bad input (its own words).
        """
        if jobs < 1:
            raise KavaError(f"jobs={jobs} is not positive; use 1 or more")
        # Not ``lock.alone``, which asks JAX who speaks: that starts a backend, which on a GPU takes
        # the memory that the runs need.
        with exclusive(self.out, "out"):
            # Seed by seed, so that a grid that is cut short has whole comparisons.
            wanted = [(arm, seed) for seed in self.grid.seeds for arm in self.grid.arms]
            known = [job for job in wanted if self._known(job)]
            # After the check above: a directory of another grid is refused with its file as it was.
            self._write_grid()
            missing = [job for job in wanted if job not in known]
            seeds = dict.fromkeys(seed for _, seed in missing if self.grid.pretrain is not None)
            first, places = [(PRETRAINED, seed) for seed in seeds], itertools.count(1)

            def tell(job: Job, word: str) -> None:
                arm, seed = job
                say(f"{next(places)}/{len(first) + len(wanted)}  {arm} seed {seed}: {word}")

            for job in known:
                tell(job, "known")
            # Where a pretrained student failed no arm is run: its start would be missing.
            return self._all(first, jobs, tell) or self._all(missing, jobs, tell)

    def _all(
        self, jobs: Iterable[Job], workers: int, tell: Callable[[Job, str], None]
    ) -> list[Job]:
        """Run them, ``workers`` at a time; returns those that failed."""
        waiting, running, failed = [(job, self._commands(job)) for job in jobs], [], []
        shares, refused = _shares(workers), None

        def call(job: Job, command: list[str], rest: list[list[str]], share: set[int]) -> None:
            running.append((job, self._call(job, command, share), rest, share))

        # An interrupt is raised in the main thread alone, so that in another none comes between a
        # process and its place in the list: a run that is not there would be told nothing.
        starter = ThreadPoolExecutor(1)
        try:
            while waiting or running:
                while waiting and shares:
                    (job, (command, *rest)), share = waiting.pop(0), shares.pop()
                    starter.submit(call, job, command, rest, share).result()
                ended = [one for one in running if one[1].poll() is not None]
                for one in ended:
                    job, process, rest, share = one
                    running.remove(one)
                    shares.append(share)
                    # Calling again does not mend bad input, so the grid ends with the run's words
                    # when the runs under way have ended.
                    if process.returncode == BAD_INPUT:
                        refused = refused or self._refusal(job)
                        waiting.clear()
                        continue
                    if process.returncode == 0 and rest:
                        waiting.insert(0, (job, rest))
                        continue
                    if process.returncode:
                        failed.append(job)
                    elif job[0] != PRETRAINED:
                        self._keep(job)
                    tell(job, "failed" if process.returncode else "finished")
                if not ended:
                    time.sleep(POLL)
        except KeyboardInterrupt:  # at a terminal the runs hear Ctrl-C too, else only this does
            starter.shutdown()
            for _, process, *_ in running:
                # On SIGTERM a run saves what it has done, and the next call continues it.
                process.terminate()
            raise
        finally:
            for _, process, *_ in running:
                process.wait()
        if refused is not None:
            raise refused
        return failed

    def _commands(self, job: Job) -> list[list[str]]:
        """What the run calls, one command after the other."""
        commands = [["train", str(self._file("configs", job, "yaml"))]]
        target = exported(self.out, job[1])
        if job[0] == PRETRAINED and not target.is_dir():
            commands += [["export", str(run_directory(self.out, *job)), "--out", str(target)]]
        return commands

    def _call(self, job: Job, arguments: list[str], cores: set[int]) -> "subprocess.Popen[bytes]":
        """Start a ``kava`` command in a process of its own, with its words in the run's log."""
        config = dump_config(run_config(self.grid, self.base, *job, self.out))
        content = yaml.safe_dump(config, sort_keys=False)
        self._file("configs", job, "yaml").write_text(content, encoding="utf-8")
        # A chat template that writes the date writes the same rows for every arm and seed, however
        # many days they take.
        today = {"SOURCE_DATE_EPOCH": str(self._started())}
        # Appended, so that a call that continues a run keeps the words of the one before.
        with self._file("logs", job, "txt").open("a", encoding="utf-8") as words:
            # The same interpreter: a ``kava`` on the PATH may belong to another environment.
            command = [sys.executable, "-m", "kava_jax", *arguments]
            # Last, and so the strongest, is what the user has set.
            environment = {**KEEP_MEMORY, **KEEP_COMPILED, **today, **os.environ}
            process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
        # A thread inherits the cores of the one that starts it, and XLA starts its threads later.
        if cores:
            os.sched_setaffinity(process.pid, cores)
        return process

    def _refusal(self, job: Job) -> KavaError:
        """The run's own last words."""
        log = self._file("logs", job, "txt").read_text("utf-8")
        *_, said = ["it said nothing", *log.strip().splitlines()]
        return KavaError(f"arms.{job[0]}, seed {job[1]}: {said.removeprefix('error: ')}")

    def _file(self, folder: str, job: Job, ending: str) -> Path:
        path = self.out / folder / f"{job[0]}-{job[1]}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _identity(self, job: Job) -> str:
        """What a run belongs to: all that the files say of it."""
        # Other arms and seeds are left out: a grid can grow and keep what it has.
        of_all = {"base": self.base, "set": self.grid.set, "pretrain": self.grid.pretrain}
        return config_hash(of_all | {"arm": self.grid.arms[job[0]], "seed": job[1]})

    def _known(self, job: Job) -> bool:
        """Whether the table has the run; KavaError when it has one of something else."""
        run = read_runs(self.out).get(job)
        if run is not None and run.identity != self._identity(job):
            raise KavaError(
                f"arms.{job[0]}: {self.out / RUNS_NAME} was made by another grid file; put the "
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
        # There is no file yet, or a broken one, which is about to be replaced.
        except (OSError, ValueError, KeyError, TypeError):
            return int(time.time())


def _shares(workers: int) -> list[set[int]]:
    """A set of cores for each job, which is its place, too; empty where none are shared out."""
    can = workers > 1 and hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if can else []
    return [set(cores[worker::workers]) for worker in range(workers)]
