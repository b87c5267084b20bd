"""`ContextParallel`: the object through which a training loop uses context parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from . import functional
from .attention.kernels.registry import KERNELS, kernel_here
from .calibration.rates import machines
from .config import ContextParallelConfig
from .cp_group import CPGroup
from .data.accelerator import share_groups
from .data.loader import prepare_data_loader
from .distributed.agreement import collective, gather_numbers, odd_rank, of_first_rank
from .distributed.devices import refuse_shared_devices
from .distributed.last_words import print_agreed_errors_once
from .distributed.leases import CLOSED, close
from .distributed.mesh import Ranks, has_nccl, world
from .distributed.messages import CheckedExchange, Exchange
from .distributed.process_groups import Groups, build_groups
from .distributed.shared_memory import make_exchange
from .integration.active_batch import ActiveBatch, active_batch
from .integration.border.parallelize import whole
from .integration.sharded_batch import ShardedBatch
from .planning import mask as masks


class ContextParallel:
    """Context parallelism of this process: its CP group, its shards of batches, and attention over the group.

    Every process of the world makes one, with the same arguments. It is a context manager, which closes it.

    Args:
        config: the settings.
        mesh: the mesh that CP groups are made of. A group is its `cp` dimension, or `config.size` consecutive ranks
            along its data dimension (`fsdp`, `dp_shard`, `dp`). Without a mesh, a group is `config.size` consecutive
            ranks of the world.

    Raises:
        ValueError: on all ranks, if the sizes do not divide, ranks ask for different settings, torch.distributed is
            not initialised, two ranks use one GPU, or the kernel cannot be used or is not the same on all ranks.

    Example:

        cp = ContextParallel(ContextParallelConfig(size=2))
        parallelize(model, cp)
        loss = model(**batch).loss  # of the whole batch
        loss.backward()
    """

    def __init__(self, config: ContextParallelConfig, mesh: DeviceMesh | None = None):
        refuse_shared_devices()
        if world().size > 1:
            print_agreed_errors_once()
        # Making groups is collective, so ranks must find out before it that they ask for different groups.
        with collective(world(), "settings or meshes", "Give every process the same ones.") as notes:
            kernel = list(KERNELS).index(kernel_here(config.kernel))
            names, shape = (mesh.mesh_dim_names, tuple(mesh.shape)) if mesh is not None else ((), ())
            notes.compare({**vars(config), "size": None, "the mesh": (names, shape)})
            notes.number = config.size
        sizes = notes.numbers
        if (odd := odd_rank(sizes)) is not None:
            raise ValueError(
                f"rank 0 asks for CP groups of size={sizes[0]} and rank {odd} for size={sizes[odd]}. "
                "Give every process the same settings."
            )
        _check_kernels(gather_numbers(world(), kernel)[0])
        self.made_with, self.mesh = config, mesh
        self._logged: set[tuple[str, str, int]] = set()
        everyone = world()
        # Ranks with different rates would choose different strategies, and wait for each other forever.
        self._machines = of_first_rank(machines(config.kernel) if everyone.rank == 0 else None, everyone)
        self._made: dict[int, CPGroup] = {}
        self._kept: list[Ranks] = []
        self._closed = False
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
    def group(self) -> CPGroup:
        """CP group of the size that is in use.

        Raises:
            RuntimeError: if this object is closed.
        """
        if self._closed:
            raise RuntimeError(CLOSED)
        return self._made[self._size]

    @property
    def config(self) -> ContextParallelConfig:
        """Settings, with the size that is in use."""
        return self.group.config

    @property
    def groups(self) -> Groups:
        """Process groups around this rank."""
        return self.group.groups

    @property
    def exchange(self) -> Exchange:
        """Messages of the CP group."""
        return self.group.exchange

    @property
    def rank(self) -> int:
        """Rank of this process in its CP group."""
        return self.groups.rank

    @property
    def size(self) -> int:
        """Number of ranks of a CP group."""
        return self.groups.size

    def resize(self, size: int) -> None:
        """Use CP groups of `size` ranks from now on. Every process of the world must call this with the same size.

        Later layouts, plans, positions and losses are for the new groups. Data loaders that are already prepared still
        deal samples to the groups that they were prepared for. The groups of each size are made only once.

        Args:
            size: ranks of a group. It divides the number of ranks of the world, or of the ranks along the `cp` or data
                dimension of the mesh.

        Raises:
            ValueError: on all ranks, if sizes differ or do not divide, or a batch is active on any rank.
        """
        with collective(world()) as notes:
            before = self.size  # which refuses a closed object
            if active_batch() is not None:
                raise ValueError(
                    f"the CP size cannot change from {before} to {size} while a batch is open. Leave "
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
        """Use CP groups of `size` ranks in a `with` block, as `resize` does. The size before is restored after it.

        Raises:
            ValueError: as in `resize`.
            RuntimeError: on leaving, if a batch that was sharded in the block is still active.
        """
        before = self.size
        self.resize(size)
        try:
            yield self
        finally:
            batch = active_batch()
            if batch is not None and batch.group is self.group:
                raise RuntimeError(
                    f"leaving `with cp.using({size})` while a batch is open that was sharded in it. Leave "
                    "`with cp.shard(...)` first."
                )
            self.switch(before)

    def switch(self, size: int) -> None:
        """Use groups that `resize` has made before. Other ranks are not asked, and may use groups of another size."""
        self._size = size

    def keep(self, ranks: Ranks) -> None:
        """End a group too that was made beside the CP groups, when this object is closed."""
        self._kept.append(ranks)

    def close(self) -> None:
        """Free all that this object has made: process groups of all sizes, threads, connections and shared memory.

        Every process of the world must call this, in the same order as the others, as it made the objects. The world
        and the groups of the mesh stay. Closing twice does nothing. Models that were prepared with this object do not
        run any more, and backward passes that have not run cannot. An object that is dropped on all ranks without a
        call of this is freed when another one is made.

        Raises:
            RuntimeError: if a batch is open.
        """
        batch = active_batch()
        if batch is not None and batch.group in self._made.values():
            raise RuntimeError("a batch is open. Leave `with cp.shard(...)` before closing its ContextParallel.")
        self._closed = True
        for group in self._made.values():
            group.exchange.close()
            close(group.groups)
            close(group.groups.same_batch)
        for ranks in self._kept:
            close(ranks)
        self._made.clear()
        self._kept.clear()

    def __enter__(self) -> ContextParallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        # After an error of one rank, the others may not come here. NCCL would wait for them.
        if kind is None or not has_nccl():
            self.close()

    def _make(self, config: ContextParallelConfig, groups: Groups) -> None:
        exchange = CheckedExchange(make_exchange(groups), groups.size)
        self._made[config.size] = CPGroup(config, groups, exchange, self.made_with.size, self._machines, self._logged)

    def shard(self, batch: Mapping[str, Any], model: torch.nn.Module | None = None) -> ShardedBatch:
        """Shard a batch for a `with` block that contains the forward and backward of the model.

        *Summed* over the CP group, the losses and the gradients of parameters equal those of one process with the
        attention of Transformers and `use_cache=False`. With packed rows, they equal those of each document alone. Not
        all models of Transformers keep packed documents apart.

        Args:
            batch: the whole batch, as one process would give it to the model, and the same on all ranks of the group.
                Or a batch of `ContextParallelDataCollator`. See `data.shard.shard_batch` for its contents.
            model: the model that is going to run. A model that would not be exact, or whose weights differ between
                ranks, is refused on entering. It may be left out for a model that `parallelize` has prepared, and for
                a model that calls `attention` itself.

        Returns:
            A context manager that yields the inputs of the model. It can be entered once. Both `labels` and
            `shift_labels` are shifted: the label of a token is the next token. Blocks for different batches may be
            nested. Outputs at padded positions are unspecified. Backward may run inside the block or after it.

        Raises:
            ValueError: on entering, with the same message on all ranks of the group, if the batch or model of a rank
                cannot be exact, or if batches, models or a sample of their weights differ. In the call of the model,
                if its inputs or a layer cannot be exact.
            RuntimeError: on entering twice; after the call of a model none of whose layers used our attention.
        """
        return ShardedBatch(self.group, batch, model)

    def sharded(self, x: torch.Tensor) -> torch.Tensor:
        """Take this rank's tokens of a tensor `[B, S, ...]` of the active batch: `[B, S_local, ...]`. Differentiable.

        The padding of the layout is 0.

        Raises:
            RuntimeError: outside `cp.shard`.
            ValueError: if the first two dimensions of the tensor are not those of the whole batch.
        """
        return self._active("sharded").take(x)

    def whole(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Run a model that `parallelize` has prepared on whole batches in a `with` block, on every rank alike."""
        return whole(model)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather `[B, S_local, ...]` of the active batch to `[B, S, ...]` on every rank, in the original order.

        It is differentiable. The objective is the sum of the losses of all ranks, so the backward sums the gradients
        of all ranks. If every rank computes the same loss of gathered tensors, that sum counts it `cp.size` times.
        Divide such a loss by `cp.size`.

        Raises:
            RuntimeError: outside `cp.shard`.
            ValueError: if the first two dimensions of the tensor are not those of the shard. Only this rank raises it,
                and the other ranks wait for it.
        """
        return self._active("gather").gather(x)

    def _active(self, caller: str) -> ActiveBatch:
        batch = active_batch()
        if batch is None or batch.group is not self.group:
            raise RuntimeError(
                f"cp.{caller}() was called without an active batch. Call it inside `with cp.shard(...)`."
            )
        return batch

    def positions(self, seq_len: int, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """List the positions of a sequence of `seq_len` tokens that this rank holds, in local order.

        These are the tokens that `attention` takes. If the number of chunks does not divide `seq_len`, ranks hold
        different numbers of tokens. (`shard` pads instead, so that all ranks hold equally many.) In the block of
        `shard`, a sequence that is as long as the padded batch is dealt as the batch. Elsewhere the layout `auto` is
        zigzag.

        Args:
            seq_len: number of tokens of the sequence.
            cu_seqlens: `[documents + 1]`, cumulative lengths of the documents of the sequence. The layout `balanced`
                depends on them.

        Returns:
            `[S_local]`, ascending, on the CPU.

        Raises:
            ValueError: if `cu_seqlens` does not rise from 0 to `seq_len`.
        """
        documents = () if cu_seqlens is None else masks.from_cu_seqlens(cu_seqlens, seq_len)
        return functional.layout_of(self.group, seq_len, documents).positions(self.rank)

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
        """Compute attention over a sequence that the ranks of the group hold together. It is differentiable.

        Args:
            q: `[B, H, S_local, D]`, the tokens that `positions` lists.
            k, v: `[B, H_kv, S_local, D]` and `[B, H_kv, S_local, D_v]`, with H_kv dividing H.
            causal: a token reads itself and the tokens before it. Otherwise, it reads all tokens of its document.
            sliding_window: a token reads only those of them that are less than this many positions away. With a causal
                window of w, a token reads itself and the w - 1 tokens before it.
            chunk_size: a token reads only those of them that lie in its own chunk. Documents are cut into chunks of
                this many positions, from their first token on.
            softcap: c, by which scores s become c * tanh(s / c).
            sinks: `[H]`, one more score for each head, which every query has, with a value of 0. Its gradient is over
                the queries of this rank. Sum it over the ranks, as for any parameter.
            scale: factor of the scores; D ** -0.5 unless given.
            cu_seqlens: `[documents + 1]`, cumulative lengths of the documents of every row.
            attention_mask: `[B, S]` of the whole sequence, 0 at padding. Padding neither reads nor is read.
            dropout_p: probability that a weight is dropped. The seed is drawn from torch's default generator on the
                CPU. Ranks drop different weights even if they have the same seed.
            deterministic: True for the same bits from the same tensors, also with kernels that do not guarantee it.
            comm_type: strategy of this call, in place of the one in the settings; see `ContextParallelConfig`.

        Returns:
            `[B, H, S_local, D_v]`; 0 for tokens that read no key.

        Raises:
            ValueError: on all ranks, before any key travels, if lengths, heads, dtypes or options do not fit.
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

    def prepare_data_loader(
        self, loader: DataLoader, accelerator: Accelerator | None = None, device: torch.device | str | None = None
    ) -> DataLoader:
        """Prepare a data loader: each CP group reads samples of its own, and all ranks of a group read the same.

        Args:
            loader: the loader of whole batches.
            accelerator: the Accelerator of the loop. It prepares the loader, and from then on takes a CP group for one
                process: `gather_for_metrics` gathers each sample once, and loaders that it prepares later are shared.
            device: without an Accelerator, the device that the loader puts batches on. It then plans attention of each
                batch ahead of its step, and a step does not wait for the device to read the batch.
        """
        if accelerator is None:
            where = {} if device is None else {"put_on_device": True, "device": torch.device(device)}
            return prepare_data_loader(loader, self.groups, self.group.planner, **where)
        share_groups(accelerator, self)
        return accelerator.prepare_data_loader(loader)


def _check_kernels(numbers: Sequence[int]) -> None:
    """Refuse ranks for which `auto` stands for different kernels, since they would round differently.

    Args:
        numbers: for each rank of the world, the place of its kernel in `KERNELS`.

    Raises:
        ValueError: naming both kernels and a rank of each.
    """
    if (odd := odd_rank(numbers)) is not None:
        first, other = (list(KERNELS)[numbers[rank]] for rank in (0, odd))
        raise ValueError(
            f"rank 0 would compute attention with kernel={first!r} and rank {odd} with kernel={other!r}, the "
            "best that kernel='auto' finds there. Install the same packages on all machines, or name one kernel that "
            "all of them have."
        )
