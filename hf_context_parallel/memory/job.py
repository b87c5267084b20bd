"""Job: a model, the ranks that train it, the tokens of a step and the options that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..attention.peak_memory import number_of_groups
from ..attention.strategy import Shape
from .facts import ModelFacts

LOGITS = 2**25
"""Logits that the loss makes at a time, if `loss_chunk_tokens` is not set."""
LEAST_CHUNK = 16
"""Fewest tokens of a chunk of the loss, if `loss_chunk_tokens` is not set."""
ATTENTION_CHECKPOINTS = ("off", "device", "host")
OPTIMIZER_STATES = {"adamw": 2, "sgd": 0}
"""Tensors that an optimizer of PyTorch keeps for each trained parameter, in its dtype."""


@dataclass(frozen=True)
class Job:
    """Step of training, of which each rank does its part.

    Args:
        facts: the model.
        tokens: tokens of the batch of a CP group, rows times length.
        cp, tp: ranks of a CP group, and of a tensor-parallel group.
        fsdp: ranks over which FSDP2 shards weights. CP ranks are among them.
        ddp: True if DDP averages gradients. Its buckets hold them once more.
        dtype: dtype of weights, activations, gradients and states.
        comm_type: `"p2p"`, `"all_gather"`, `"a2a"` or `"a2a+p2p"`.
        a2a_size: ranks that exchange heads under `"a2a+p2p"`.
        kernel: kernel of attention. With `"cpu"` buffers are kept from layer to layer.
        checkpointing: True to keep the input of each layer, and compute the layer again in backward.
        offload: True to keep these inputs on the host.
        attention_checkpoints: one of `ATTENTION_CHECKPOINTS`: where outputs of attention are kept with checkpointing.
        tile_tokens: tokens that an MLP treats at a time; None for all.
        loss_chunk_tokens: tokens whose logits are made at a time; None for `LOGITS` logits.
        optimizer: one of `OPTIMIZER_STATES`.
        head_groups: number of groups of heads whose attention is computed one after another. None for the number that
            is chosen by length (`attention/peak_memory.py`).
        accumulates: True if gradients of earlier batches are held while a batch is computed.
        sharded: True if a group of one rank shards its batch too. Without, it runs the attention of Transformers,
            which is not kept.
        image_tokens: tokens of the batch whose places features of images take.
        batches: batches whose pixels are on the device. A Trainer has all those of a step of the optimizer.

    Raises:
        ValueError: if a name is not among those listed.
    """

    facts: ModelFacts
    tokens: int
    cp: int = 1
    tp: int = 1
    fsdp: int = 1
    ddp: bool = False
    dtype: torch.dtype = torch.bfloat16
    comm_type: str = "p2p"
    a2a_size: int = 1
    kernel: str = "torch"
    checkpointing: bool = True
    offload: bool = False
    attention_checkpoints: str = "off"
    tile_tokens: int | None = None
    loss_chunk_tokens: int | None = None
    optimizer: str = "adamw"
    head_groups: int | None = None
    accumulates: bool = False
    sharded: bool = False
    image_tokens: int = 0
    batches: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("attention_checkpoints", self.attention_checkpoints, ATTENTION_CHECKPOINTS),
            ("optimizer", self.optimizer, OPTIMIZER_STATES),
            ("comm_type", self.comm_type, ("p2p", "all_gather", "a2a", "a2a+p2p")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}. Give one of these.")

    @property
    def rank_tokens(self) -> int:
        """Tokens of a rank."""
        return -(-self.tokens // self.cp)

    @property
    def is_alone(self) -> bool:
        """True if attention is that of Transformers."""
        ours = self.sharded or self.tile_tokens is not None or self.attention_checkpoints != "off"
        return self.cp == 1 and not ours

    @property
    def keeps_attention(self) -> bool:
        """True if outputs of attention are kept with checkpointing."""
        return self.checkpointing and self.attention_checkpoints != "off" and not self.is_alone

    @property
    def inner(self) -> int:
        """Ranks that exchange heads."""
        return {"a2a": self.cp, "a2a+p2p": min(self.cp, self.a2a_size)}.get(self.comm_type, 1)

    @property
    def groups(self) -> int:
        """Groups of heads whose attention is computed one after another."""
        strategy = self.comm_type, self.cp, self.inner, self.rank_tokens
        return 1 if self.is_alone else number_of_groups(self.head_groups, self.shape, self.kernel, *strategy)

    @property
    def shape(self) -> Shape:
        """Heads, head dims and dtype of attention on a rank, before heads are exchanged."""
        facts = self.facts
        heads, key_heads = -(-facts.heads // self.tp), -(-facts.key_heads // self.tp)
        return Shape(heads, key_heads, facts.query_dim, facts.value_dim, self.dtype)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a rank whose logits the loss makes at a time."""
        chunk = self.loss_chunk_tokens or max(LEAST_CHUNK, LOGITS // self.facts.vocabulary)
        return min(chunk, self.rank_tokens)

    @property
    def mlp_tokens(self) -> int:
        """Tokens of a rank that an MLP treats at a time."""
        return min(self.tile_tokens or self.rank_tokens, self.rank_tokens)

    @property
    def is_tiled(self) -> bool:
        """True if MLPs and norms treat some tokens at a time."""
        return self.mlp_tokens < self.rank_tokens
