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


GPUS = {
    "a100": Gpu(
        calls_itself="NVIDIA A100-SXM4-80GB",
        major=8,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        cores=108,
        fpus_per_core=64,
        clock_ghz=1.41,
        l2_bytes=41_943_040,
        shared_bytes=167_936,
    ),
    "h100": Gpu(
        calls_itself="NVIDIA H100 80GB HBM3",
        major=9,
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        l2_bytes=52_428_800,
        shared_bytes=233_472,
    ),
    "h200": Gpu(
        calls_itself="NVIDIA H200",
        major=9,
        memory=150_100_000_000,  # to three digits
        bandwidth=4_800_000_000_000,
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        l2_bytes=52_428_800,
        shared_bytes=233_472,
    ),
    "b200": Gpu(
        calls_itself="NVIDIA B200",
        major=10,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        cores=148,
        fpus_per_core=128,
        clock_ghz=1.965,
        l2_bytes=132_644_864,
        shared_bytes=233_472,
    ),
}


def target_config(gpu: Gpu) -> str:
    """The GPU as XLA's ``GpuTargetConfigProto``, in text; CUDA 12.9 and cuDNN 9.12."""
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
