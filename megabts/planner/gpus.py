"""GPUs and their links: what the planner assumes, in one table.

Memory, its bandwidth and NVLink are from NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, B200), the network
from NVIDIA's DGX systems of each kind: A100 eight 200 Gb/s ports for eight GPUs, the others eight of 400 Gb/s. NVLink
and network are the bytes of one direction, per GPU. Peaks are dense: bf16 from `runtime.device`, fp32 without TF32.
"""

from dataclasses import dataclass

from megabts.errors import UsageError
from megabts.runtime.device import PEAK_FLOPS

MATMUL_SHARE = 0.75
"""Share of the peak that matrix products reach; one H200 does 769-798 of 989 TFLOP/s on 8192^3 in bf16."""
MEMORY_SHARE = 0.8
"""Share of the memory's bandwidth that element-wise kernels reach."""
LINK_SHARE = 0.8
"""Share of a link's bandwidth that collectives reach."""
RESERVED = 3.0e9
"""Bytes that CUDA, its libraries and NCCL's channels take before any tensor."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its usual node."""

    name: str
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink: float
    """Bytes per second to its neighbours in the node, one direction."""
    network: float
    """Bytes per second to other nodes, one direction."""
    bf16: float
    """Operations per second."""
    fp32: float

    def peak(self, value_bytes: int) -> float:
        """Operations per second on values of 2 (bf16) or 4 (fp32) bytes."""
        return self.bf16 if value_bytes == 2 else self.fp32


GPUS = {
    "a100-80g": Gpu("A100 80 GB", 80e9, 2.039e12, 300e9, 25e9, PEAK_FLOPS["A100"], 19.5e12),
    "h100": Gpu("H100", 80e9, 3.35e12, 450e9, 50e9, PEAK_FLOPS["H100"], 67e12),
    "h200": Gpu("H200", 141e9, 4.8e12, 450e9, 50e9, PEAK_FLOPS["H200"], 67e12),
    "b200": Gpu("B200", 180e9, 8.0e12, 900e9, 50e9, PEAK_FLOPS["B200"], 75e12),
}
"""By the name that the planner's --gpu takes."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes of one size."""

    gpu: Gpu
    num_gpus: int
    per_node: int

    @classmethod
    def of(cls, gpu: str, num_gpus: int, num_nodes: int | None = None) -> "Cluster":
        """`num_nodes` None: nodes of eight. Raises UsageError for an unknown kind or nodes that do not divide."""
        if gpu not in GPUS:
            raise UsageError(f"--gpu {gpu} is unknown; use one of {', '.join(GPUS)}")
        if num_gpus < 1:
            raise UsageError(f"--gpus is {num_gpus}; it must be at least 1")
        nodes = -(-num_gpus // GPUS_PER_NODE) if num_nodes is None else num_nodes
        if nodes < 1 or num_gpus % nodes:
            given = f"--nodes {nodes}" if num_nodes is not None else f"{nodes} nodes of {GPUS_PER_NODE}"
            raise UsageError(f"--gpus {num_gpus} do not divide among {given}; give --nodes that divide them")
        return cls(GPUS[gpu], num_gpus, num_gpus // nodes)

    def in_node(self, span: int) -> bool:
        """Whether ranks of which the first and last are within `span` of each other share a node."""
        return self.per_node % span == 0

    def bandwidth(self, span: int) -> float:
        """Bytes per second that collectives among such ranks reach."""
        return (self.gpu.nvlink if self.in_node(span) else self.gpu.network) * LINK_SHARE
