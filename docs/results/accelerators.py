"""The step of the named job by the compilers of GPUs and TPUs, which need no GPU and no TPU.

    make accelerators                                   install the compilers, check, write the JSON
    python docs/results/accelerators.py [programs|plans]                        both, or one of them

``programs``: one step on each chip and mesh, and what its compiled program holds: bytes, matrix
products by dtype, how often the LM head's products stand in it, attention kernels. ``plans``:
``kava plan``, which searches for the largest batch. Written to accelerators.json. Exit code 1, and
words, when a product has float32 sides, the LM head is computed twice, or a model attends without
its kernel. A TPU's products are convolutions to its compiler, and are counted without their FLOPs.

accelerators_before.json is the same of commit 52b9862, before the step was mended.
"""

import json
import math
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "qwen2.5_14b_to_1.5b_gsm8k.yaml"
WRITTEN = HERE / "accelerators.json"

# Chip, devices, mesh, rows, length. Bucketed rows are padded to multiples of 8, so kernels meet
# lengths that are no multiple of their blocks.
PROGRAMS = [
    ("h100", 1, "fsdp=1", 32, 512),
    ("h100", 1, "fsdp=1", 32, 264),
    ("h100", 1, "fsdp=1", 32, 136),
    ("h100", 8, "fsdp=8", 64, 512),
    ("h100", 8, "fsdp=4,tensor=2", 64, 512),
    ("h100", 64, "fsdp=64", 256, 512),
    ("h100", 64, "fsdp=32,tensor=2", 256, 512),
    ("a100", 1, "fsdp=1", 16, 512),
    ("h200", 1, "fsdp=1", 32, 512),
    ("b200", 1, "fsdp=1", 32, 512),
    ("v5e", 16, "fsdp=16", 64, 512),
    ("v5e", 16, "fsdp=16", 64, 136),
    ("v5e", 64, "fsdp=64", 256, 512),
    ("v5e", 64, "fsdp=32,tensor=2", 256, 512),
]
PLANS = [("h100", 1, "fsdp=1"), ("h100", 8, "fsdp=8"), ("h200", 1, "fsdp=1")]
# The LM head's products, as training/lm_head.py writes them: logits and both gradients.
HEAD = {"logits": "snd,vd->snv", "of_hidden": "snv,vd->snd", "of_table": "snv,snd->svd"}
KERNELS = re.compile(r'custom_call_target="(__cudnn\$fmha\w*|tpu_custom_call)"')
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "libtpu")


def main() -> None:
    """Do what is asked, write, and say what is wrong."""
    parts = {"programs": programs, "plans": plans}
    found = json.loads(WRITTEN.read_text(encoding="utf-8")) if WRITTEN.is_file() else {}
    for name in sys.argv[1:] or parts:
        found[name] = parts[name]()
    found["versions"] = {name: _version(name) for name in PACKAGES}
    WRITTEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = [words for one in found.get("programs", []) for words in complaints(one)]
    sys.exit("\n".join(wrong) if wrong else 0)


def programs() -> list[dict[str, Any]]:
    """Every program, each compiled in a process of its own: devices are counted once."""
    return [_answer([sys.executable, __file__, "one", *map(str, program)]) for program in PROGRAMS]


def plans() -> list[dict[str, Any]]:
    """``kava plan`` of the config as it is, with the search for the most rows."""
    kava = [sys.executable, "-m", "kava_jax", "plan", str(CONFIG), "--json"]
    asked = [
        [*kava, "--chip", chip, "--devices", str(devices), "--mesh", mesh]
        for chip, devices, mesh in PLANS
    ]
    return [_answer(command) for command in asked]


def compiled(chip: str, devices: int, mesh: str, rows: int, length: int) -> dict[str, Any]:
    """One program, compiled for its chips."""
    from kava_jax.plan.planning import compile_for, virtual_devices

    virtual_devices(devices)
    from kava_jax.config.file import load_config
    from kava_jax.plan.chips import find_chip
    from kava_jax.plan.compiled import memory_of

    sizes = [f"mesh.{size}" for size in mesh.split(",")]
    config = load_config(CONFIG, [f"data.batch_size={rows}", f"data.max_length={length}", *sizes])
    program = compile_for(config, find_chip(chip))
    memory = memory_of(program)
    told = {"chip": chip, "devices": devices, "mesh": mesh, "rows": rows, "length": length}
    bytes_ = {"arguments": memory.arguments, "temporaries": memory.temporaries}
    return told | bytes_ | described(program.as_text())


def described(text: str) -> dict[str, Any]:
    """What stands in a compiled program."""
    from kava_jax.plan.program import work_of

    work = work_of(text)
    multiplied = [line for line in text.splitlines() if re.search(r" (dot|convolution)\(", line)]
    return {
        "products": dict(work.products),
        "tflops": None if math.isnan(work.flops) else work.flops / 1e12,
        "head": {name: sum(einsum in line for line in multiplied) for name, einsum in HEAD.items()},
        "attention_kernels": len(KERNELS.findall(text)),
    }


def complaints(found: dict[str, Any]) -> list[str]:
    """What is wrong with a program, in words."""
    where = " ".join(str(found[key]) for key in ("chip", "devices", "mesh", "rows", "length"))
    words = [
        f"{times} matrix products of {sides}"
        for sides, times in found["products"].items()
        if "f32" in sides  # integers (positions, masks) are no part of the models
    ]
    words += [
        f"the LM head's {name} stands {times} times in the program"
        for name, times in found["head"].items()
        if times != 1
    ]
    # The teacher's forward pass; the student's, that again, and its backward pass.
    if found["attention_kernels"] < 4:
        words.append(f"{found['attention_kernels']} attention kernels, not 4")
    return [f"{where}: {word}" for word in words]


def _answer(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        chip, devices, mesh, rows, length = sys.argv[2:]
        print(json.dumps(compiled(chip, int(devices), mesh, int(rows), int(length))))
    else:
        main()
