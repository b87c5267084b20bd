"""`ContextParallel`: what a training loop holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from . import functional
from .attention.kernels.registry import named_kernel
from .config import ContextParallelConfig
from .cp_group import CPGroup
from .data.loader import prepare_data_loader
from .distributed.agreement import collective, fingerprint, odd_rank
from .distributed.mesh import world
from .distributed.messages import Exchange, GroupExchange
from .distributed.process_groups import Groups, build_groups
from .integration.active_batch import active_batch
from .integration.sharded_batch import ShardedBatch
from .planning import mask as masks
from .planning.balanced import make_layout


class ContextParallel:
    """This process's part in context parallelism: its group, its shards of batches, its attention.

    Args:
        config: the settings.
        mesh: where CP groups lie. Without one they are `config.size` consecutive ranks of the world; with one, its
            `cp` dimension, or `config.size` consecutive ranks along its data dimension (`fsdp`, `dp_shard`, `dp`).

    Every process of the world makes one, with the same arguments.

    Raises:
        ValueError: on every rank alike, if the sizes do not divide, ranks ask for different settings,
            torch.distributed is not initialised, or the kernel is not here.

    Example:

        cp = ContextParallel(ContextParallelConfig(size=2))
        with cp.shard(batch, model) as local:
            loss = model(**local).loss
            loss.backward()
    """

    def __init__(self, config: ContextParallelConfig, mesh: DeviceMesh | None = None):
        # Making groups is collective, so ranks that want different ones must learn of it before.
        with collective(world(), "settings or meshes", "Give every process the same ones.") as notes:
            if config.kernel != "auto":  # which is chosen by where the tensors are
                named_kernel(config.kernel)
            names, shape = (mesh.mesh_dim_names, tuple(mesh.shape)) if mesh is not None else ((), ())
            notes.fingerprint = fingerprint({"settings": {**vars(config), "size": None}, "mesh": (names, shape)})
            notes.number = config.size
        sizes = notes.numbers
        if (odd := odd_rank(sizes)) is not None:
            raise ValueError(
                f"rank 0 asks for CP groups of size={sizes[0]} and rank {odd} for size={sizes[odd]}: all ranks must "
                "ask for the same. Give every process the same settings."
            )
        self.made_with, self.mesh = config, mesh
        self._logged: set[tuple[str, str, int]] = set()
        self._made: dict[int, CPGroup] = {}
        self.group: CPGroup
        self._make(config, build_groups(config.size, mesh))
        self.switch(config.size)
        if config.sequence_parallel and self.groups.tensor.size == 1:
            raise ValueError(
                "sequence_parallel=True shards activations over the ranks of tensor parallelism, and there is none "
                f"({'no mesh was given' if mesh is None else f'the mesh has dimensions {mesh.mesh_dim_names}'}). Load "
                "the model with distributed_config=DistributedConfig(tp_size=..., fsdp_size=...) and give "
                "mesh=hf_context_parallel.mesh_of(model), or leave sequence_parallel off."
            )

    @property
    def config(self) -> ContextParallelConfig:
        """The settings, with the size that is in use."""
        return self.group.config

    @property
    def groups(self) -> Groups:
        """The process groups around this rank."""
        return self.group.groups

    @property
    def exchange(self) -> Exchange:
        """The messages of the CP group."""
        return self.group.exchange

    @property
    def rank(self) -> int:
        """This process's rank in its CP group."""
        return self.groups.rank

    @property
    def size(self) -> int:
        """The ranks of a CP group."""
        return self.groups.size

    def resize(self, size: int) -> None:
        """Split what follows over groups of `size` ranks. Every process of the world must call this alike.

        Layouts, plans, positions and losses follow. Data loaders that were prepared go on dealing samples to the
        groups that they were prepared for. The groups of a size are made once.

        Args:
            size: a divisor of the ranks that CP may divide: the world's, or those along the mesh's `cp` or data
                dimension.

        Raises:
            ValueError: on every rank alike, if sizes differ or do not divide, or a batch is open on any rank.
        """
        with collective(world()) as notes:
            if active_batch() is not None:
                raise ValueError(
                    f"the CP size cannot change from {self.size} to {size} while a batch is open: leave "
                    "`with cp.shard(...)` first."
                )
            config, notes.number = self.made_with.of_size(size), size
        sizes = notes.numbers
        if (odd := odd_rank(sizes)) is not None:
            raise ValueError(
                f"the ranks ask for different CP sizes: rank 0 for size={sizes[0]} and rank {odd} for "
                f"size={sizes[odd]}. Call resize() or using() with the same size on every process of the world."
            )
        if size not in self._made:
            self._make(config, build_groups(size, self.mesh, divided=True))
        self.switch(size)

    @contextmanager
    def using(self, size: int) -> Iterator[ContextParallel]:
        """`resize` for a `with` block; leaving it, also by an exception, returns to the size before.

        Raises:
            ValueError: as `resize` does.
            RuntimeError: on leaving while a batch is open, which would go on with other groups than it was shared by.
        """
        before = self.size
        self.resize(size)
        try:
            yield self
        finally:
            batch = active_batch()
            if batch is not None and batch.group is self.group:
                raise RuntimeError(
                    f"leaving `with cp.using({size})` while a batch is open that was sharded in it: leave "
                    "`with cp.shard(...)` first."
                )
            self.switch(before)

    def switch(self, size: int) -> None:
        """Go on with groups that `resize` has made before, without asking the other ranks, which may be on others."""
        self.group = self._made[size]

    def _make(self, config: ContextParallelConfig, groups: Groups) -> None:
        exchange = GroupExchange(groups.group)
        self._made[config.size] = CPGroup(config, groups, exchange, self.made_with.size, self._logged)

    def shard(self, batch: Mapping[str, Any], model: torch.nn.Module | None = None) -> ShardedBatch:
        """This rank's share of a batch, for a `with` block that covers the model's forward and backward.

        Losses and parameters' gradients, *summed* over the CP group, equal those of one process with stock attention
        and `use_cache=False`; of packed rows, those of each document alone, which stock models do not all keep apart.

        Args:
            batch: the whole batch, the same on every rank of the group, as one process would give it to the model; or
                what `ContextParallelDataCollator` yields. See `data.shard_batch` for what it may hold.
            model: the model that is going to run, so that a model that would not be exact, or whose weights are not
                the same on all ranks, is refused at once.

        Returns:
            A context manager that yields the model's inputs, to be entered once. `labels` and `shift_labels` are
            both shifted: a token's is the next one's. Blocks for different batches nest. Outputs at padded positions
            are unspecified. Call the model itself and not its `forward`: what runs is checked as it is called.

        Raises:
            ValueError: on entering, with the same message on all ranks of the group, if a rank's batch or model cannot
                be exact, or batches, models or a sample of their weights differ.
            RuntimeError: on entering twice; on running backward, or gradient checkpointing's recomputation, after
                leaving; on leaving after a model ran without its attention being sharded.
        """
        return ShardedBatch(self.group, batch, model)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, S_local, ...]` of the current batch as `[B, S, ...]` in the original order, on every rank.

        Differentiable. The objective is the sum of the ranks' losses, so the backward sums the ranks' gradients. A
        loss that every rank computes of gathered tensors is N times in that sum: divide it by `cp.size`.

        Raises:
            RuntimeError: outside `cp.shard`.
            ValueError: if the tensor's first two dimensions are not the shard's; on this rank alone, so that the
                others wait for it.
        """
        batch = active_batch()
        if batch is None or batch.group is not self.group:
            raise RuntimeError(
                "cp.gather() restores the order of the current batch: call it inside `with cp.shard(...)`."
            )
        return batch.gather(x)

    def positions(self, seq_len: int, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """The positions of a sequence of `seq_len` tokens that this rank holds, in local order.

        These are the tokens that `attention` takes. Where the layout does not divide `seq_len`, ranks hold different
        numbers of tokens; `shard` pads instead, so that all hold equally many.

        Args:
            seq_len: tokens of the sequence.
            cu_seqlens: `[documents + 1]`, cumulative lengths of the sequence's documents, which the layout `balanced`
                goes by.

        Returns:
            `[S_local]`, ascending, on the CPU.

        Raises:
            ValueError: if `cu_seqlens` does not rise from 0 to `seq_len`.
        """
        documents = () if cu_seqlens is None else masks.from_cu_seqlens(cu_seqlens, seq_len)
        return make_layout(self.config.layout, seq_len, self.size, documents).positions(self.rank)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = True,
        sliding_window: int | None = None,
        chunk_size: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        scale: float | None = None,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        deterministic: bool = False,
        comm_type: str | None = None,
    ) -> torch.Tensor:
        """Attention over a sequence that the group holds together. Differentiable.

        Args:
            q: `[B, H, S_local, D]`, the tokens that `positions` lists.
            k, v: `[B, H_kv, S_local, D]` and `[B, H_kv, S_local, D_v]`, with H_kv dividing H.
            causal: a token reads itself and what comes before it; otherwise, all of its document.
            sliding_window: of these, only those less than this many positions away: of a causal window of w a token
                reads itself and the w - 1 before it.
            chunk_size: of these, only those in its own chunk: documents are cut into chunks of this many positions,
                from their first token on.
            softcap: c, where scores s become c * tanh(s / c).
            sinks: `[H]`, a score a head that every query has beside those of its keys, with a value of 0. Its gradient
                is of this rank's queries, to be summed over the ranks as any parameter's.
            scale: what scores are multiplied with, D ** -0.5 unless given.
            cu_seqlens: `[documents + 1]`, cumulative lengths of the documents of every row.
            attention_mask: `[B, S]` of the whole sequence, 0 at padding, which is neither read nor reads.
            dropout_p: the probability that a weight is left out. Which ones is drawn from torch's default generator
                (the CPU's), so its seed decides; ranks leave out different ones though they are seeded alike.
            deterministic: the same bits from the same tensors, with kernels that are otherwise not.
            comm_type: how keys travel, where the configuration's is not meant; see `ContextParallelConfig`.

        Returns:
            `[B, H, S_local, D_v]`; 0 for tokens that read nothing.

        Raises:
            ValueError: on every rank alike, if lengths, heads, dtypes or options do not fit, before any key moves.
        """
        return functional.attention(
            self.group,
            q,
            k,
            v,
            pattern=masks.Pattern(causal, sliding_window, chunk_size),
            softcap=softcap,
            sinks=sinks,
            scale=scale,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            dropout_p=dropout_p,
            deterministic=deterministic,
            comm_type=comm_type,
        )

    def prepare_data_loader(self, loader: DataLoader) -> DataLoader:
        """The loader, dealing every CP group its own samples, and all ranks of a group the same ones."""
        return prepare_data_loader(loader, self.groups)
