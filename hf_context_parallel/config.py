"""Settings of context parallelism, and their validation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p", "auto")
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
LAYOUTS = ("auto", "zigzag", "contiguous", "balanced")
ATTENTION_CHECKPOINTS = ("auto", "off", "device", "host")
LOGITS = ("auto", "whole", "shard")
ON_SAVE_ERROR = ("raise", "continue")
KERNELS = ("auto", "cpu", "torch", "cudnn", "flash_attn", "flash_attn_3", "flash_attn_4", "reference")


@dataclass(frozen=True)
class ContextParallelConfig:
    """Settings of context parallelism (CP): the split of sequences over the ranks of a group, and the strategy.

    Args:
        size: ranks in a CP group. Each holds 1/size of every sequence. It must divide the world size.
        comm_type: the strategy, by which keys/values reach the queries. It never changes what is computed.
            `"p2p"`: a ring, overlapped with computing.
            `"all_gather"`: all keys/values that a rank reads arrive at once.
            `"a2a"`: queries, keys and values are exchanged, so that a rank has all tokens of some heads (Ulysses).
            `"a2a+p2p"`: a2a among `a2a_size` neighbouring ranks, and a ring of such subgroups.
            `"auto"`: for each batch, the strategy that is estimated to be fastest, of those that fit into memory.
            A list gives one of these for each layer. A mapping gives one for each layer type of the model
            (`full_attention`, `sliding_attention`, `chunked_attention`).
        a2a_size: number of ranks that exchange heads under `"a2a+p2p"`. It divides `size`. None is the largest number
            that divides both the key heads and `size`, so that no key goes to two ranks of a subgroup. Under
            `"auto"`, None tries every divisor of `size`.
        layout: the tokens that rank r holds.
            `"auto"`: those of `"balanced"` for batches whose work it shares more evenly, and those of `"zigzag"` for
            others, and for sequences that `attention` is given outside of a batch.
            `"zigzag"`: chunks r and 2 * size - 1 - r of 2 * size, so that all ranks have equal work for one causal
            document.
            `"balanced"`: more and finer chunks, dealt so that all ranks have nearly equal work for the documents of
            the batch. It is zigzag for one document, or if ranks hold fewer than 2,048 tokens.
            `"contiguous"`: chunk r of size.
        kernel: the kernel that computes attention on one rank.
            `"auto"`: on CUDA the first that can be used of `"flash_attn_3"`, `"flash_attn_4"`, `"cudnn"` (on Hopper
            and Blackwell), `"flash_attn"` and `"torch"`; on a CPU `"cpu"`. It is the same on all ranks. cuDNN gets a
            length only when that has come so often that compiling it has paid.
            `"torch"`: PyTorch's own CUDA flash attention, version 2.
            `"flash_attn"`: FlashAttention-2 of the package flash-attn.
            `"flash_attn_3"`: FlashAttention-3, for Hopper: the module `flash_attn_interface`, or what the package
            `kernels` downloads where that is installed.
            `"flash_attn_4"`: FlashAttention-4 of the package flash-attn-4, for Hopper and Blackwell. It compiles each
            variant in about 10 s.
            `"cudnn"`: attention of cuDNN for long documents, `"flash_attn"` or `"torch"` for the rest. Each new length
            is compiled at once, in up to 1.4 s.
            `"cpu"`: PyTorch's CPU flash attention.
            `"reference"`: plain PyTorch, for any dtype and device. It is slow, and holds the scores of one block of
            queries at a time.
        attention_checkpoints: where gradient checkpointing keeps the output of each layer's attention, so that
            backward neither computes it again nor sends keys for it.
            `"auto"`: on the device if it fits by the model of memory (`memory/`), else on the host of a CUDA device if
            that fits, else nowhere.
            `"off"`: nowhere.
            `"device"`: on the device.
            `"host"`: in pinned memory of the host, copied while kernels run.
        head_groups: number of groups of key heads, with the query heads that read them, whose attention is computed
            one after another. Keys of other ranks, sums of gradients, exchanged heads and what kernels allocate exist
            for one group at a time. Where heads are exchanged, each rank has as many key heads of every group, so
            there may be fewer groups. None takes as few as bring attention of a layer below 4 GiB.
        check_batch: True to compare a checksum of each batch, and of some weights of the model, between the ranks of a
            CP group before the model runs, and to look for tokens outside of the vocabulary. Other local checks and
            the exchange of their outcome are always on.
        verify: True to let the Trainer compare the model on shards with the model on whole sequences before the first
            step. It stops if a layer differs by more than rounding; see `verify`.
        nan_steps: number of optimizer steps in a row with a loss that is NaN or infinite on any rank, after which the
            Trainer stops. None goes on.
        on_save_error: what the Trainer does when a checkpoint cannot be written, for want of room on the disk say.
            `"raise"`: all ranks raise the same error.
            `"continue"`: it warns, and trains on without this checkpoint.
        sequence_parallel: True to shard activations between the regions of tensor parallelism (norms, residuals,
            their dropout) over the ranks of a tensor-parallel group, by tokens, as in Megatron-LM.
        logits: the logits that a language model returns.
            `"auto"`: None in training with labels, where the loss makes the logits of some tokens at a time. Otherwise
            those of the whole batch.
            `"whole"`: those of the whole batch, `[B, S, V]`, on every rank.
            `"shard"`: those of this rank's tokens, padded for the layout. A loss of these alone is a part of the loss
            of the batch, and has to be multiplied by the size of the group.
        loss_chunk_tokens: number of tokens whose logits the loss makes at a time. None takes as many as have 2**25
            logits together, 128 MiB in float32.
        tile_tokens: number of tokens of a shard that MLPs, mixtures of experts and norms compute at a time. What lies
            inside of them exists for these tokens alone, in forward and backward, and backward computes them once
            more. None computes all tokens at once.
        dynamic: True to let the Trainer deal the samples of a global batch to groups of `size` ranks and fewer, so
            that short samples are split less than long ones.
        max_tokens_per_rank: largest number of packed tokens that a rank holds with `dynamic`. A sample must fit on the
            ranks of a group together.

    Raises:
        ValueError: if a value is out of range or not among those listed.
    """

    size: int = 1
    comm_type: str | Sequence[str] | Mapping[str, str] = "auto"
    a2a_size: int | None = None
    layout: str = "auto"
    kernel: str = "auto"
    attention_checkpoints: str = "auto"
    head_groups: int | None = None
    check_batch: bool = True
    verify: bool = True
    nan_steps: int | None = 3
    on_save_error: str = "raise"
    sequence_parallel: bool = False
    logits: str = "auto"
    loss_chunk_tokens: int | None = None
    tile_tokens: int | None = None
    dynamic: bool = False
    max_tokens_per_rank: int | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.size):
            raise ValueError(f"size={self.size!r} is not a number of ranks. Give an integer of 1 or more.")
        self._check_comm_type()
        if self.a2a_size is not None and (not _is_count(self.a2a_size) or self.size % self.a2a_size):
            raise ValueError(
                f"a2a_size={self.a2a_size!r} does not divide size={self.size}. Give one of "
                f"{', '.join(str(n) for n in range(1, self.size + 1) if self.size % n == 0)}, or None."
            )
        choices = {
            "layout": LAYOUTS,
            "kernel": KERNELS,
            "attention_checkpoints": ATTENTION_CHECKPOINTS,
            "logits": LOGITS,
            "on_save_error": ON_SAVE_ERROR,
        }
        for field, allowed in choices.items():
            _check_choice(field, getattr(self, field), allowed)
        for field in ("check_batch", "verify", "sequence_parallel", "dynamic"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r} is not a bool. Give true or false.")
        for field in ("loss_chunk_tokens", "tile_tokens"):
            tokens = getattr(self, field)
            if tokens is not None and not _is_count(tokens):
                raise ValueError(
                    f"{field}={tokens!r} is not a number of tokens. Give an integer of 1 or more, or None."
                )
        if self.head_groups is not None and not _is_count(self.head_groups):
            raise ValueError(f"head_groups={self.head_groups!r} is not a number of groups. Give 1 or more, or None.")
        if self.nan_steps is not None and not _is_count(self.nan_steps):
            raise ValueError(f"nan_steps={self.nan_steps!r} is not a number of steps. Give 1 or more, or None.")
        most = self.max_tokens_per_rank
        if most is not None and (not _is_count(most) or most < 2):
            raise ValueError(f"max_tokens_per_rank={most!r} is not a number of tokens. Give an integer of 2 or more.")
        if self.dynamic != (most is not None):
            raise ValueError(
                f"dynamic={self.dynamic} does not go with max_tokens_per_rank={most}, since groups are chosen by the "
                "tokens that a rank can hold. Set both, or neither."
            )

    def _check_comm_type(self) -> None:
        if isinstance(self.comm_type, Mapping):
            for layer_type, value in self.comm_type.items():
                _check_choice("comm_type's layer type", layer_type, LAYER_TYPES)
                _check_choice(f"comm_type[{layer_type!r}]", value, COMM_TYPES)
        elif isinstance(self.comm_type, Sequence) and not isinstance(self.comm_type, str):
            object.__setattr__(self, "comm_type", tuple(self.comm_type))
            for layer, value in enumerate(self.comm_type):
                _check_choice(f"comm_type[{layer}]", value, COMM_TYPES)
        else:
            check_comm_type(self.comm_type)

    def comm_type_of(self, layer_type: str, layer: int | None) -> str:
        """Strategy of a layer.

        Args:
            layer_type: one of `LAYER_TYPES`.
            layer: number of the layer in the model, or None if it has none.

        Raises:
            ValueError: if `comm_type` does not name a strategy for such a layer.
        """
        if isinstance(self.comm_type, str):
            return self.comm_type
        if isinstance(self.comm_type, Mapping):
            if layer_type in self.comm_type:
                return self.comm_type[layer_type]
            raise ValueError(
                f"comm_type names {', '.join(self.comm_type) or 'no layer type'}, but the model has a {layer_type} "
                f"layer. Add {layer_type!r} to it."
            )
        if layer is None:
            raise ValueError(
                f"comm_type lists {len(self.comm_type)} entries, one for each layer, but this attention has no layer "
                "number. Give one comm_type for all layers, or a mapping from layer types."
            )
        self.check_layers(max(layer + 1, len(self.comm_type)))
        return self.comm_type[layer]

    def of_size(self, size: int) -> ContextParallelConfig:
        """Settings for groups of another size. `a2a_size` becomes its greatest common divisor with `size`.

        Raises:
            ValueError: if `size` is not a number of ranks.
        """
        inner = self.a2a_size
        return replace(self, size=size, a2a_size=math.gcd(inner, size) if inner and _is_count(size) else None)

    def check_layers(self, layers: int | None) -> None:
        """Refuse a list in `comm_type` that has more or fewer entries than the model has layers.

        Raises:
            ValueError: naming both numbers.
        """
        listed = isinstance(self.comm_type, tuple)
        if listed and len(self.comm_type) != layers:
            raise ValueError(
                f"comm_type lists {len(self.comm_type)} entries, but the model has {layers} layers. Give one for each."
            )


def refuse(cases: Iterable[tuple[object, str]], message: str) -> None:
    """Refuse the first case that holds.

    Args:
        cases: a condition, and the words for it, of each case.
        message: the error message, with `{}` in the place of the words.

    Raises:
        ValueError: if any case holds.
    """
    for wrong, what in cases:
        if wrong:
            raise ValueError(message.format(what))


def check_comm_type(value: object) -> None:
    """Refuse a value that is not the name of a strategy.

    Raises:
        ValueError: naming the value, and the strategies.
    """
    _check_choice("comm_type", value, COMM_TYPES)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        nearest = difflib.get_close_matches(str(value), allowed, n=1)
        remedy = f"Did you mean {nearest[0]!r}?" if nearest else "Give one of these."
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}. {remedy}")
