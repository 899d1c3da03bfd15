"""One device layout and one strictness for all tests: eight virtual CPU devices, no hub."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads for XLA: by default as many as devices. While each device holds one and waits for the
# others, a piece of work that one of them still needs may find none left, and all wait for ever.
os.environ.setdefault("NPROC", "32")
# Eight virtual devices wait for each other on two busy cores; XLA's default is to abort after 40 s.
# The breadth-first order of XLA's CPU compiler leaves independent collectives side by side. Devices
# may then begin them in unlike orders, and each waits for the others for ever. (Processes that are
# joined need that order: ``tiny.JOINED``.)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# Tests compile far more than they compute: no optimisation by LLVM, each program in one piece (the
# cores have other tests to run), and no kernels by MLIR while jaxlib still leaves the choice (an
# unknown flag ends the process). `make test-optimized` leaves all three as users have them.
if "KAVA_TEST_OPTIMIZED" not in os.environ:
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
        + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else "")
    )
# What one test has compiled, another one reads: in its own process, in the other worker, in the
# processes that it starts. The folder is new for every run of the tests, made by its first process.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kava-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Workers of pytest-xdist ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """Looking for garbage among all that was imported, at every turn, takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _no_module_keeps_its_programs() -> Iterator[None]:
    """Else a worker's memory grows with every file, past 5 GB."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, tokenizers and the real tiny model, kept beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared data folder is not beside the checkout ({SHARED.name}/ missing)")
    return SHARED
