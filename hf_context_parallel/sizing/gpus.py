"""Published figures of GPUs, and the rates of a machine that follow from them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..attention.kernels.registry import kernel_name
from ..calibration.rates import calibration_of
from ..planning.machine import H100_KERNELS, H100_NODE, Machine

GIB = 2**30
NODE = 8
"""GPUs of a node."""
NETWORK = 50e9
"""Bytes a second that a GPU sends to other nodes: one link of 400 Gb/s for each GPU."""
USABLE = 0.92
"""Share of a GPU's memory for tensors. The rest is for CUDA's context, NCCL's buffers and gaps of the allocator."""


class Gpu(NamedTuple):
    """Figures of a GPU, all as its maker publishes them.

    Args:
        name: the name that the command knows it by.
        memory: bytes. What makers call a gigabyte of memory is close to 2**30 bytes.
        peak: floating-point operations a second of dense matrix products in bfloat16.
        bandwidth: bytes a second between the GPU and its memory.
        nvlink: bytes a second to other GPUs of its node, in each direction. None without NVLink.
        pcie: bytes a second to the host, in each direction.
        family: the chip, which kernels depend on.
        source: where the figures are from.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    nvlink: float | None
    pcie: float
    family: str
    source: str

    @property
    def link(self) -> float:
        """Bytes a second to other GPUs of its node, in each direction."""
        return self.nvlink or self.pcie

    @property
    def usable(self) -> float:
        """Bytes of its memory that tensors can take."""
        return USABLE * self.memory


_SHEET = "NVIDIA's data sheet of the"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40 * GIB, 312e12, 1.555e12, 300e9, 32e9, "ampere", f"{_SHEET} A100 (SXM)"),
        Gpu("a100-80gb", 80 * GIB, 312e12, 2.039e12, 300e9, 32e9, "ampere", f"{_SHEET} A100 (SXM)"),
        Gpu("h100-80gb", 80 * GIB, 989e12, 3.35e12, 450e9, 64e9, "hopper", f"{_SHEET} H100 (SXM)"),
        Gpu("h200-141gb", 141 * GIB, 989e12, 4.8e12, 450e9, 64e9, "hopper", f"{_SHEET} H200 (SXM)"),
        Gpu("b200-180gb", 180 * GIB, 2250e12, 8e12, 900e9, 64e9, "blackwell", f"{_SHEET} DGX B200, by GPU"),
        Gpu("l40s-48gb", 48 * GIB, 362e12, 0.864e12, None, 32e9, "ada", f"{_SHEET} L40S"),
        Gpu("rtx4090-24gb", 24 * GIB, 165e12, 1.008e12, None, 32e9, "ada", "NVIDIA's white paper on Ada, appendix A"),
        Gpu("rtx5090-32gb", 32 * GIB, 209e12, 1.792e12, None, 64e9, "ada", "NVIDIA's white paper on RTX Blackwell"),
    )
}
"""GPUs by name. Peaks are those with sums in float32 and without sparsity."""

LINEAR, MEMORY, LINK, NETWORK_SHARE, PCIE = 0.6, 0.75, 0.8, 0.9, 0.8
"""Shares of published rates that are assumed to be reached: by matrix products, by element-wise work, by messages
within a node and between nodes, and by copies to the host."""
FLASH_ATTENTION_2 = 0.6, 0.5
"""Shares of the peak that FlashAttention-2 reaches on Ampere in forward and backward, of the 0.5 to 0.73 that its
paper reports (Dao, 2023, arXiv:2307.08691). They are taken for Ada too."""


class Rates(NamedTuple):
    """Rates by which steps are estimated.

    Args:
        machine: the rates of a rank and its links.
        host: bytes a second between the GPU and the host, in each direction.
        memory: bytes of a rank that tensors can take.
        assumptions: where these are from, a sentence for each.
    """

    machine: Machine
    host: float
    memory: float
    assumptions: tuple[str, ...]


def find_gpu(name: str) -> Gpu:
    """Find a GPU by its name, or by a beginning of it that no other GPU has.

    Raises:
        ValueError: listing the names that are known.
    """
    wanted = name.lower().replace(" ", "")
    found = [gpu for gpu in GPUS.values() if gpu.name == wanted or gpu.name.startswith(f"{wanted}-")]
    if len(found) != 1:
        raise ValueError(f"--gpu={name!r} is not one of {', '.join(GPUS)}. Give one of them.")
    return found[0]


def gpu_here() -> Gpu | None:
    """Return the GPU of this machine, or None if PyTorch sees none, or none that is known."""
    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name().lower().replace(" ", ""), torch.cuda.mem_get_info()[1]
    same = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name]
    return min(same, key=lambda gpu: abs(gpu.memory - memory), default=None)


def rates_of(gpu: Gpu, node: int = NODE, network: float = NETWORK) -> Rates:
    """Rates of a GPU: those that were calibrated where this machine has such a GPU, and published ones otherwise.

    Args:
        node: GPUs of a node.
        network: bytes a second that a GPU sends to other nodes.
    """
    machine, kernel = _published(gpu, node, network)
    link = "NVLink" if gpu.nvlink else "PCIe"
    said = [
        f"{gpu.name}: {gpu.memory / GIB:.0f} GiB, of which {USABLE:.0%} is for tensors; {gpu.peak / 1e12:.0f} TFLOP/s "
        f"in bfloat16, {gpu.bandwidth / 1e12:.2f} TB/s of memory, {gpu.link / 1e9:.0f} GB/s of {link} and "
        f"{gpu.pcie / 1e9:.0f} GB/s to the host a direction ({gpu.source})",
        f"of these figures, {LINEAR:.0%} is reached by matrix products, {MEMORY:.0%} by element-wise work, {LINK:.0%} "
        f"by messages in a node and {PCIE:.0%} by copies to the host",
        f"attention runs at {machine.forward / 1e12:.0f} TFLOP/s forward and {machine.backward / 1e12:.0f} backward "
        f"({kernel})",
        f"a node has {node} GPUs, and a GPU sends {network / 1e9:.0f} GB/s to other nodes, of which "
        f"{NETWORK_SHARE:.0%} is reached",
    ]
    if gpu_here() == gpu:
        calibration = calibration_of("cuda", kernel_name("auto", "cuda"))
        if calibration is not None:
            machine = replace(machine, **calibration.rates, source=f"calibrated on {calibration.date}")
            names = ", ".join(sorted(calibration.rates))
            said.append(f"calibrated on {calibration.date} on this machine, in place of the above: {names}")
    return Rates(machine, PCIE * gpu.pcie, gpu.usable, tuple(said))


def _published(gpu: Gpu, node: int, network: float) -> tuple[Machine, str]:
    """Rates by published figures, and the source of those of attention."""
    (forward, backward), name, source = _attention(gpu)
    machine = Machine(
        forward=forward,
        backward=backward,
        linear=LINEAR * gpu.peak,
        memory=MEMORY * gpu.bandwidth,
        bandwidth=LINK * gpu.link,
        node_bandwidth=NETWORK_SHARE * network,
        latency=H100_NODE.latency,
        node_latency=H100_NODE.node_latency,
        launch=H100_NODE.launch,
        node=node,
        kernel=name,
        source=f"published figures of the {gpu.name}",
    )
    return machine, source


def _attention(gpu: Gpu) -> tuple[tuple[float, float], str, str]:
    """Operations a second of attention in each pass, the name of the kernel, and the source."""
    cudnn, measured = H100_KERNELS["cudnn"], "cuDNN, measured on an H100 in benchmarks/results/h100.md"
    if gpu.family == "hopper":
        return cudnn, "cudnn", measured
    if gpu.family == "blackwell":
        share = gpu.peak / GPUS["h100-80gb"].peak
        return (cudnn[0] * share, cudnn[1] * share), "cudnn", f"{measured}, by the ratio of the peaks"
    forward, backward = (share * gpu.peak for share in FLASH_ATTENTION_2)
    return (forward, backward), "flash_attn", "FlashAttention-2, by the shares of the peak that its paper reports"
