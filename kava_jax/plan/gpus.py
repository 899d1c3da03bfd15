"""What NVIDIA's compiler is told of a GPU that is not here: what the driver would say of it."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """The figures that differ between GPUs, as CUDA's device query gives them."""

    calls_itself: str
    major: int
    """Of the compute capability; the minor number is 0 throughout."""
    memory: int
    """Bytes, a few percent more than the maker's round figure."""
    bandwidth: int
    """Bytes a second."""
    cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    """Of one core; a block may have 1 KiB less."""


# fmt: off
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 85_100_068_864, 2_039_040_000_000,
                108, 64, 1.41, 41_943_040, 167_936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 84_942_979_072, 3_352_320_000_000,
                132, 128, 1.98, 52_428_800, 233_472),
    # Its memory is given to three digits.
    "h200": Gpu("NVIDIA H200", 9, 150_100_000_000, 4_800_000_000_000,
                132, 128, 1.98, 52_428_800, 233_472),
    "b200": Gpu("NVIDIA B200", 10, 191_514_411_008, 7_672_320_000_000,
                148, 128, 1.965, 132_644_864, 233_472),
}
# fmt: on


def target_config(gpu: Gpu) -> str:
    """The GPU as XLA's ``GpuTargetConfigProto``, in text; CUDA 12.9 and cuDNN 9.12."""
    # Limits of threads, blocks and registers are equal for compute capability 8.0, 9.0 and 10.0.
    # A block has 48 KiB of shared memory unless its kernel opts in to more.
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          registers_per_core_limit: 65536  registers_per_block_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_core: {gpu.shared_bytes}
          shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
          core_count: {gpu.cores}  fpus_per_core: {gpu.fpus_per_core}
          clock_rate_ghz: {gpu.clock_ghz}
          l2_cache_size: {gpu.l2_bytes}
          memory_bandwidth: {gpu.bandwidth}
          device_memory_size: {gpu.memory}
          cuda_compute_capability {{ major: {gpu.major} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9  minor: 12 }}
        runtime_version {{ major: 12  minor: 9  patch: 0 }}
        device_description_str: "{gpu.calls_itself}"
    """
