"""What a user can ask for, validated where it is written."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p", "auto")
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
LAYOUTS = ("zigzag", "contiguous", "balanced")
KERNELS = ("auto", "cpu", "torch", "flash_attn", "reference")


@dataclass(frozen=True)
class ContextParallelConfig:
    """How the sequence is split over the ranks of a context-parallel (CP) group, and how keys travel.

    Args:
        size: ranks in a CP group. Each holds 1/size of every sequence. It must divide the world size.
        comm_type: how keys and values reach the queries. `"p2p"`: a ring, overlapped with computing. `"all_gather"`:
            all that a rank reads at once. `"a2a"`: queries, keys and values by head instead of by token (Ulysses).
            `"a2a+p2p"`: the latter among `a2a_size` neighbouring ranks and a ring of such subgroups. `"auto"`: the
            one that is estimated to be fastest, batch by batch. Or a list with one of these a layer, or a mapping
            from layer types (`full_attention`, `sliding_attention`, `chunked_attention`) to them, all that a model
            has. It never changes what is computed.
        a2a_size: ranks that exchange heads under `"a2a+p2p"`; it divides `size`. None: as many as divide both the key
            heads and `size`, so that no key goes to two of them.
        layout: which tokens a rank holds. `"zigzag"`: chunks r and 2 * size - 1 - r of 2 * size, so that every
            rank has the same share of a causal mask of one document. `"balanced"`: as many chunks as it takes, dealt
            so that every rank has the same share of the batch's documents; zigzag where there is one, or where
            ranks hold fewer than 2,048 tokens.
            `"contiguous"`: chunk r of size.
        kernel: what computes attention on one rank. `"auto"` takes the best that is present: `"flash_attn"` (the
            flash-attn package), `"torch"` (PyTorch's own CUDA flash attention) or `"cpu"` (PyTorch's CPU flash
            attention). `"cudnn"` is cuDNN's by PyTorch for long documents, and `"torch"` for all else: the fastest on
            Hopper where lengths repeat, since each new length costs up to a second. `"reference"` is plain PyTorch,
            for any dtype and device, and keeps a matrix of scores.
        check_batch: compare a checksum of each batch, and of some of the model's weights, between the ranks of a CP
            group before the model runs, and look for tokens outside of its vocabulary. The other local checks and the
            exchange of their outcome stay on when it is off.
        verify: before the first step, the Trainer compares the model on shards with the model on whole sequences, and
            stops where a layer differs by more than rounding does; see `verify`.
        sequence_parallel: with tensor parallelism, between its regions (norms, residuals, their dropout) each rank of
            a tensor-parallel group computes and keeps its share of the tokens only, as in Megatron-LM.
        dynamic: the Trainer deals the samples of a global batch to groups of `size` ranks and fewer, so that short
            ones need not be split as long ones are.
        max_tokens_per_rank: the most tokens that a rank holds then, packed; a sample fits where the ranks of a group
            hold it together.

    Raises:
        ValueError: if a value is out of range or not among those listed.
    """

    size: int = 1
    comm_type: str | Sequence[str] | Mapping[str, str] = "p2p"
    a2a_size: int | None = None
    layout: str = "zigzag"
    kernel: str = "auto"
    check_batch: bool = True
    verify: bool = True
    sequence_parallel: bool = False
    dynamic: bool = False
    max_tokens_per_rank: int | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.size):
            raise ValueError(f"size={self.size!r}: the number of ranks in a CP group must be an integer of 1 or more.")
        self._check_comm_type()
        if self.a2a_size is not None and (not _is_count(self.a2a_size) or self.size % self.a2a_size):
            raise ValueError(
                f"a2a_size={self.a2a_size!r} must divide size={self.size}: "
                f"{', '.join(str(n) for n in range(1, self.size + 1) if self.size % n == 0)}, or None."
            )
        for field, allowed in (("layout", LAYOUTS), ("kernel", KERNELS)):
            _check_choice(field, getattr(self, field), allowed)
        for field in ("check_batch", "verify", "sequence_parallel", "dynamic"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r} must be true or false.")
        most = self.max_tokens_per_rank
        if most is not None and (not _is_count(most) or most < 2):
            raise ValueError(f"max_tokens_per_rank={most!r} must be a number of tokens, 2 or more.")
        if self.dynamic != (most is not None):
            raise ValueError(
                f"dynamic={self.dynamic} with max_tokens_per_rank={most}: groups are chosen by the tokens that a rank "
                "can hold, and by nothing else. Set both, or neither."
            )
        if self.dynamic and self.layout == "balanced":
            raise ValueError(
                "layout='balanced' pads rows by their documents, so that dynamic=True could not tell which of them a "
                "rank can hold. Take layout='zigzag' or 'contiguous'."
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
        """How keys travel in a layer.

        Args:
            layer_type: one of `LAYER_TYPES`.
            layer: its number in the model, if it has one.

        Raises:
            ValueError: if `comm_type` says nothing of such a layer.
        """
        if isinstance(self.comm_type, str):
            return self.comm_type
        if isinstance(self.comm_type, Mapping):
            if layer_type in self.comm_type:
                return self.comm_type[layer_type]
            raise ValueError(
                f"comm_type says nothing of {layer_type} layers, and the model has one: it names "
                f"{', '.join(self.comm_type) or 'none'}. Add {layer_type!r} to it."
            )
        if layer is None:
            raise ValueError(
                f"comm_type is a list of {len(self.comm_type)} entries, one a layer, and this attention does not know "
                "which layer it is of. Give one comm_type for all, or a mapping from layer types."
            )
        self.check_layers(max(layer + 1, len(self.comm_type)))
        return self.comm_type[layer]

    def of_size(self, size: int) -> ContextParallelConfig:
        """The same for groups of another size, with the subgroups that are left of `a2a_size`.

        Raises:
            ValueError: if `size` is no number of ranks.
        """
        inner = self.a2a_size
        return replace(self, size=size, a2a_size=math.gcd(inner, size) if inner and _is_count(size) else None)

    def check_layers(self, layers: int | None) -> None:
        """Refuse a list of another length than a model's layers.

        Raises:
            ValueError: naming both.
        """
        listed = isinstance(self.comm_type, tuple)
        if listed and len(self.comm_type) != layers:
            raise ValueError(
                f"comm_type lists {len(self.comm_type)} entries and the model has {layers} layers: give one for each."
            )


def refuse(cases: Iterable[tuple[object, str]], message: str) -> None:
    """Refuse the first of the cases that is so.

    Args:
        cases: whether it is so, and what is said of it.
        message: the error, with `{}` in the place of that.

    Raises:
        ValueError: if any is.
    """
    for wrong, what in cases:
        if wrong:
            raise ValueError(message.format(what))


def check_comm_type(value: object) -> None:
    """Refuse what does not name a way for keys to travel.

    Raises:
        ValueError: naming it, and those that there are.
    """
    _check_choice("comm_type", value, COMM_TYPES)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        nearest = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.{hint}")
