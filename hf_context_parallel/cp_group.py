"""`CPGroup`: the ranks that share a sequence, their settings, and how they compute attention together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .attention.auto_strategy import Choice, choose
from .attention.executor import attend, one_dtype
from .attention.kernels.base import Kernel
from .attention.kernels.registry import check_kernel, choose_kernel
from .attention.scores import Scores, make_scores, seed_of
from .attention.strategy import Shape, Strategy
from .config import ContextParallelConfig
from .distributed.messages import Exchange
from .distributed.process_groups import Groups
from .planning.layout import Layout
from .planning.machine import machine_of
from .planning.mask import Mask, layer_type

logger = logging.getLogger(__name__)


class AttentionCall(NamedTuple):
    """The tensors of a layer in one dtype, the kernel that takes them, and the scores that it makes."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kernel: Kernel
    scores: Scores

    @property
    def shape(self) -> Shape:
        """The heads, dims and dtype of the layer."""
        return Shape.of(self.query, self.key, self.value)


@dataclass(frozen=True)
class CPGroup:
    """A group of ranks that share sequences. Another size is another group.

    Args:
        config: the settings, whose size is that of this group.
        groups: the process groups around this rank.
        exchange: the messages of the group.
        first_size: the size that its `ContextParallel` was made with, before any `resize`.
    """

    config: ContextParallelConfig
    groups: Groups
    exchange: Exchange
    first_size: int
    _logged: set[tuple[str, str, int]] = field(default_factory=set, compare=False, repr=False)
    """The choices of `auto` that were logged."""

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.groups.rank

    @property
    def size(self) -> int:
        """The ranks of the group."""
        return self.groups.size

    def kernel(self, device: torch.device) -> Kernel:
        """The kernel that computes attention on a device.

        Raises:
            ValueError: if there is none.
        """
        return choose_kernel(self.config.kernel, device.type)

    def choice(self, comm_type: str, layout: Layout, mask: Mask, shape: Shape, device: torch.device) -> Choice:
        """How a layer's keys travel, where `comm_type` may be `"auto"`. Each new choice is logged with its reason.

        Args:
            comm_type: one of `COMM_TYPES`.
            layout, mask, shape: of the whole sequence, and of the heads of the layer.
            device: whose rates estimates are made with.
        """
        machine = machine_of(device, self.groups.node, self.groups.cores)
        choice = choose(self.config, comm_type, layout, mask, shape, machine)
        kind = layer_type(mask.pattern)
        if choice.reason and (kind, *choice[:2]) not in self._logged and self.rank == 0:
            self._logged.add((kind, *choice[:2]))
            subgroups = f" in subgroups of {choice.inner}" if choice.inner > 1 else ""
            logger.info("comm_type='auto' of %s is %r%s: %s", kind, choice.comm_type, subgroups, choice.reason)
        return choice

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
        """A call of attention, before anything travels. Dropout's seed is drawn here.

        Args:
            query: `[B, H, S_local, D]`.
            key, value: `[B, H_kv, S_local, D]` and `[B, H_kv, S_local, D_v]`.

        Raises:
            ValueError: if the kernel does not take the tensors, or cannot make such scores.
        """
        query, key, value = one_dtype(query, key, value)
        scores = make_scores(query, scale, softcap, dropout_p, deterministic)
        kernel = self.kernel(query.device)
        check_kernel(kernel, query, value, scores)
        # Ranks of a tensor-parallel group may draw alike, and their heads are not the same ones.
        scores = scores._replace(seed=seed_of(scores.seed, self.groups.tensor.rank))
        return AttentionCall(query, key, value, kernel, scores)

    def attend(
        self,
        call: AttentionCall,
        strategy: Strategy,
        sinks: torch.Tensor | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Attention of this rank's queries to the keys of the group: `[B, S_local, H, D_v]`.

        Args:
            sinks: `[H]`, a score a head beside those of the keys, whose value is 0.
            guard: called before backward; raises if the gradients cannot be computed.
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
            guard=guard,
        )
