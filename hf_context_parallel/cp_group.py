"""`CPGroup`: ranks that share sequences, with their settings, messages, kernel and choice of strategy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol
from weakref import WeakSet

import torch

from .attention.auto_strategy import Choice
from .attention.executor import attend, one_dtype
from .attention.kernels.base import Kernel
from .attention.kernels.registry import check_kernel, choose_kernel
from .attention.planner import Layer, Planner
from .attention.scores import Scores, make_scores, seed_of
from .attention.strategy import Shape, Strategy
from .config import ContextParallelConfig
from .distributed.devices import check_backend
from .distributed.free_memory import least_free_bytes
from .distributed.messages import CheckedExchange
from .distributed.process_groups import Groups
from .planning.layout import Layout
from .planning.machine import Machine
from .planning.mask import Mask, layer_type

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Share of the memory that is free at the first call of attention, which `auto` lets one layer need at its peak.

At that time, activations and the states of an optimizer may not have been allocated yet."""


class AttentionCall(NamedTuple):
    """Tensors of a layer in one dtype, the kernel that computes them, and the rule for scores."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kernel: Kernel
    scores: Scores

    @property
    def shape(self) -> Shape:
        """Heads, head dims and dtype of the layer."""
        return Shape.of(self.query, self.key, self.value)


@dataclass(frozen=True)
class CPGroup:
    """Group of ranks that share sequences. Its size is fixed.

    Args:
        config: the settings. Their size is the size of this group.
        groups: the process groups around this rank.
        exchange: the messages of the group.
        first_size: the size that the `ContextParallel` was made with, before any `resize`.
        machines: rates for estimates, by the type of the device. They are the same on all ranks.
    """

    config: ContextParallelConfig
    groups: Groups
    exchange: CheckedExchange
    first_size: int
    machines: Mapping[str, Machine] = field(compare=False, repr=False)
    _logged: set[tuple[object, ...]] = field(default_factory=set, compare=False, repr=False)
    """Choices of `auto` that were logged."""
    compared: WeakSet[torch.nn.Module] = field(default_factory=WeakSet, compare=False, repr=False)
    """Models whose weights the ranks have compared whole."""
    planner: Planner = field(init=False, compare=False, repr=False)
    """Planner of this rank."""

    def __post_init__(self) -> None:
        here = {kind: self.machine(torch.device(kind)) for kind in self.machines}
        object.__setattr__(self, "planner", Planner(self.config, self.rank, here))

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return self.groups.rank

    @property
    def size(self) -> int:
        """Number of ranks of the group."""
        return self.groups.size

    def kernel(self, device: torch.device) -> Kernel:
        """Kernel that computes attention on a device.

        Raises:
            ValueError: if there is no kernel for the device.
        """
        return choose_kernel(self.config.kernel, device.type)

    def machine(self, device: torch.device) -> Machine:
        """Rates of a device, for estimates of this group."""
        if device.type == "cuda":
            return replace(self.machines["cuda"], node=self.groups.node)
        return replace(self.machines["cpu"], node=self.groups.node, cores=self.groups.cores)

    def strategy(
        self, comm_type: str, layout: Layout, mask: Mask, shape: Shape, device: torch.device, padding: bool = False
    ) -> Strategy:
        """Choose the strategy of a layer, and make the part of this rank. Batches that are alike share it.

        All ranks must call this with the same arguments; see `choice`.

        Args:
            padding: True to compute the queries of padding too.
        """
        layer = Layer(comm_type, mask.pattern, shape, device.type, padding)
        self._choice(layer, layout, mask, device)
        return self.planner.strategy(layer, layout, mask)

    def choice(self, comm_type: str, layout: Layout, mask: Mask, shape: Shape, device: torch.device) -> Choice:
        """Choose the strategy of a layer. Each new choice of `"auto"` is logged with its reason.

        All ranks must call this with the same arguments. The first call with `"auto"` compares the free memory of the
        ranks.

        Args:
            comm_type: one of `COMM_TYPES`.
            layout, mask: layout and mask of the whole batch.
            shape: heads, head dims and dtype of the layer.
            device: device whose rates are used in estimates.
        """
        return self._choice(Layer(comm_type, mask.pattern, shape, device.type), layout, mask, device)

    def _choice(self, layer: Layer, layout: Layout, mask: Mask, device: torch.device) -> Choice:
        # The ranks compare their memory even if this choice is kept, which may differ between them.
        if layer.comm_type == "auto" and self.size > 1 and layer.device not in self.planner.free:
            self.planner.free[layer.device] = SHARE * least_free_bytes(self.groups, device)
        choice = self.planner.choice(layer, layout, mask)
        kind = layer_type(mask.pattern)
        if choice.reason:
            subgroups = f" in subgroups of {choice.inner}" if choice.inner > 1 else ""
            source = self.planner.machines[layer.device].source
            self.log_once(
                ("comm_type", kind, *choice[:2]),
                f"comm_type='auto' of {kind} is {choice.comm_type!r}{subgroups}: {choice.reason}; by {source}",
            )
        return choice

    def log_once(self, choice: tuple[object, ...], message: str) -> None:
        """Log a choice that was made for the user, on the first rank, if it is new."""
        if self.rank == 0 and choice not in self._logged:
            self._logged.add(choice)
            logger.info("%s", message)

    def prepare(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        dropout_p: float,
        deterministic: bool,
    ) -> AttentionCall:
        """Prepare a call of attention, before anything travels. The seed of dropout is drawn here.

        Args:
            query: `[B, H, S_local, D]`.
            key, value: `[B, H_kv, S_local, D]` and `[B, H_kv, S_local, D_v]`.

        Raises:
            ValueError: if the kernel does not support the tensors or the scores, or the group cannot send the tensors.
        """
        if self.size > 1:
            check_backend(self.groups.group, query.device)
        query, key, value = one_dtype(query, key, value)
        scores = make_scores(query, scale, softcap, dropout_p, deterministic)
        kernel = self.kernel(query.device)
        check_kernel(kernel, query, value, scores)
        # Ranks of a tensor-parallel group may draw the same seed, but they hold different heads.
        scores = scores._replace(seed=seed_of(scores.seed, self.groups.tensor.rank))
        return AttentionCall(query, key, value, kernel, scores)

    def attend(
        self,
        call: AttentionCall,
        strategy: Strategy,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute attention of this rank's queries to the keys of the group: `[B, S_local, H, D_v]`.

        Args:
            sinks: `[H]`, one more score for each head, with a value of 0.
        """
        return attend(
            call.query,
            call.key,
            call.value,
            strategy=strategy,
            exchange=self.exchange,
            kernel=call.kernel,
            scores=call.scores,
            sinks=sinks,
        )


class HasGroup(Protocol):
    """Object that knows the CP group that is in use, such as `ContextParallel`."""

    @property
    def group(self) -> CPGroup:
        """The CP group that is in use."""
