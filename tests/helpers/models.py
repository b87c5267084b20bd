"""Helpers of the model tests: tiny models, and batches for them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from transformers import masking_utils
from transformers.distributed import DistributedConfig

import hf_context_parallel as hcp
from hf_context_parallel.integration.model_registry import KNOWN, is_table_of_installed
from hf_context_parallel.verification.types import tiny
from hf_context_parallel.verification.types.tiny import VOCABULARY

needs_sharding_while_loading = pytest.mark.skipif(
    not hasattr(DistributedConfig, "dp_replicate_size"),
    reason="this version of Transformers does not shard a model that is trained over two dimensions",
)
needs_chunks_of_documents = pytest.mark.skipif(
    not hasattr(masking_utils, "remap_positions_for_packed_sequence"),
    reason="this version of Transformers counts chunks from the row's start, and packing is refused with them",
)


def needs_transformers(version: str, why: str):
    """Mark a test that needs a version of Transformers or newer."""
    return pytest.mark.skipif(Version(transformers.__version__) < Version(version), reason=why)


needs_the_tables_version = pytest.mark.skipif(
    not is_table_of_installed(json.loads(KNOWN.read_text())),
    reason="the table lists the types of another version of Transformers",
)


def tiny_model(model_type: str, attention: str | None, dtype: torch.dtype = torch.float64, **changes):
    """Make a tiny model of this type, which is the same for every value of `attention`."""
    return tiny.tiny_model(tiny.tiny_config(model_type, **changes), attention, dtype)


def context(**settings) -> hcp.ContextParallel:
    """Make a CP group of all ranks of the process group, or of this process alone."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return hcp.ContextParallel(hcp.ContextParallelConfig(size=size, **settings))


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw random token ids `[rows, length]` without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_labels(input_ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Draw labels for a third of the tokens."""
    draw = torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(seed))
    return input_ids.masked_fill(draw > 1 / 3, -100)


def document_positions(*lengths: int) -> torch.Tensor:
    """Make position ids `[1, sum]` of packed documents with these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def reduced(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks."""
    tensor = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the largest difference, relative to the largest expected entry or to 1e-8 if that is larger."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-8)).item()


def labelled(rows: int = 2, length: int = 19, seed: int = 0) -> dict[str, torch.Tensor]:
    input_ids = tokens(rows, length, seed)
    return {"input_ids": input_ids, "labels": some_labels(input_ids, seed)}


def label_at_padding() -> dict:
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, 12:] = 0
    return {"input_ids": tokens(2, 19), "labels": tokens(2, 19), "attention_mask": mask}


def loss_in(batch: dict, model: torch.nn.Module, **more) -> torch.Tensor:
    """Shard a batch, and compute this rank's part of the loss."""
    with context().shard(batch, model) as local:
        return model(**local, **more).loss.detach()
