"""Launch scripts: valid shell, dry runs with the exact commands, starts again when it helps."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
# What each script needs beside its arguments for a dry run.
NEEDS = {
    "tpu_pod.sh": {"NAME": "pod", "ZONE": "z", "TYPE": "v5litepod-64", "BUCKET": "b"},
    "gke.sh": {
        "NAME": "job",
        "IMAGE": "example/kava:tpu",
        "HOSTS": "16",
        "CHIPS": "4",
        "ACCELERATOR": "tpu-v5-lite-podslice",
        "TOPOLOGY": "8x8",
        "BUCKET": "b",
    },
}
ARGUMENTS = ["configs/demo.yaml", "run.name=a b", "loss.kv_weight={start: 1, end: 0}"]


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / name), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(name: str, *options: str, **environment: str) -> str:
    done = run(name, "--dry-run", *options, *ARGUMENTS, **NEEDS.get(name, {}), **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_valid_shell_of_one_screen_and_says_how_to_use_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert os.access(script, os.X_OK)
    assert len(script.read_text().splitlines()) <= 60
    done = run(script.name)
    assert done.returncode == 2
    assert f"launch/{script.name}" in done.stderr
    assert not done.stdout


def test_local_runs_one_process_or_several_with_their_share_of_the_gpus() -> None:
    (line,) = dry("local.sh", CUDA_VISIBLE_DEVICES="").splitlines()
    assert shlex.split(line) == ["env", "kava", "train", *ARGUMENTS]
    lines = dry("local.sh", "--processes", "2", CUDA_VISIBLE_DEVICES="0,1,2,3").splitlines()
    for number, (line, gpus) in enumerate(zip(lines, ("0,2", "1,3"), strict=True)):
        assert shlex.split(line) == [
            "env",
            f"CUDA_VISIBLE_DEVICES={gpus}",
            "KAVA_COORDINATOR=127.0.0.1:8476",
            "KAVA_PROCESSES=2",
            f"KAVA_PROCESS={number}",
            *["kava", "train", *ARGUMENTS],
        ]


def test_slurm_runs_a_process_a_gpu_and_queues_again() -> None:
    command, again = dry("slurm.sbatch", SLURM_JOB_ID="77").splitlines()
    assert shlex.split(command) == ["srun", "--kill-on-bad-exit=1", "kava", "train", *ARGUMENTS]
    assert again.startswith("scontrol requeue 77")
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert directives["signal"] == "TERM@300"
    assert "requeue" in directives


@pytest.mark.parametrize(("code", "queued"), [(75, True), (0, False), (2, False), (1, False)])
def test_slurm_queues_again_only_what_was_saved(tmp_path: Path, code: int, queued: bool) -> None:
    for name, body in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" > queued')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(LAUNCH / "slurm.sbatch"), "run.yaml"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == code
    assert (tmp_path / "queued").exists() == queued


def in_bucket(name: str) -> list[str]:
    """The arguments with a run directory in the bucket, which a later one would overrule."""
    return [ARGUMENTS[0], f"run.dir=gs://b/{name}", *ARGUMENTS[1:]]


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_nothing_is_written_through_fuse(file: Path) -> None:
    assert not re.search(r"\bfuse|s3?fuse|fuse\.csi", file.read_text(), re.I)


def test_a_tpu_pod_is_asked_for_installed_used_and_given_back() -> None:
    commands = [shlex.split(line) for line in dry("tpu_pod.sh", SPOT="1").splitlines()]
    verbs = [" ".join(words[3:5]) for words in commands]
    assert verbs == [
        "queued-resources create",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "queued-resources delete",
    ]
    assert "--spot" in commands[0]
    trained = commands[3][commands[3].index("--command") + 1]
    assert "--worker=all" in commands[3]
    assert shlex.split(trained.partition("&& ")[2]) == [
        *["../venv/bin/kava", "--cluster", "train"],
        *in_bucket("pod"),
    ]


def test_the_jobset_is_whole_and_every_pod_knows_its_number() -> None:
    text = dry("gke.sh")
    assert not re.search(r"\$\{[A-Z]", text)
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["kava", "train", *in_bucket("job")]
    assert "volumes" not in job["template"]["spec"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["KAVA_COORDINATOR"]["value"] == "job-hosts-0-0.job:8476"
    assert variables["KAVA_PROCESSES"]["value"] == "16"
    path = variables["KAVA_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    done = run("gke.sh", "run.yaml", **(NEEDS["gke.sh"] | {"IMAGE": "", "BUCKET": ""}))
    assert done.returncode == 2
    assert done.stderr.endswith("missing: IMAGE BUCKET\n")


@pytest.mark.parametrize("kind", ["cuda", "tpu"])
def test_images_install_the_package_with_its_extra(kind: str) -> None:
    lines = (LAUNCH / f"Dockerfile.{kind}").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((LAUNCH.parent / source).exists() for source in sources)
    extras = "tpu,gcs" if kind == "tpu" else kind
    assert f"RUN pip install --no-cache-dir '.[{extras}]'" in lines


def fake_kava(place: Path, body: str) -> str:
    path = place / "kava"
    path.write_text(f'#!/usr/bin/env bash\necho "$@" >> {place}/log\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [("1 1 0", 3, 0), ("2 0", 1, 2), ("75 0", 1, 75), ("1 1 1 1", 3, 1)],
)
def test_local_starts_again_after_a_crash_only(
    tmp_path: Path, codes: str, starts: int, code: int
) -> None:
    body = f'codes=({codes})\nexit "${{codes[$(wc -l < {tmp_path}/log) - 1]}}"'
    result = run("local.sh", "run.yaml", KAVA=fake_kava(tmp_path, body), TRIES="3")
    assert result.returncode == code
    assert (tmp_path / "log").read_text().splitlines() == ["train run.yaml"] * starts


def test_local_passes_a_request_to_end_on_and_waits(tmp_path: Path) -> None:
    body = f"trap 'sleep 0.3; exit 75' TERM\ntouch {tmp_path}/ready-$KAVA_PROCESS\nsleep 30 & wait"
    process = subprocess.Popen(
        [str(LAUNCH / "local.sh"), "--processes", "2", "run.yaml"],
        env=os.environ | {"KAVA": fake_kava(tmp_path, body)},
    )
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert len((tmp_path / "log").read_text().splitlines()) == 2  # not started again
