"""Tensor parallelism beside context parallelism: a model on T x C (x D) ranks is the model on one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from models import some_labels, tiny_model, tokens
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_context_parallel as hcp
from hf_context_parallel.mesh import mesh_of

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tensor_parallel_model(folder, attention="context_parallel", dtype=torch.float64, **sizes):
    """The model in the folder, sharded."""
    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, attn_implementation=attention, dtype=dtype
    )


def batch() -> dict[str, torch.Tensor]:
    input_ids = tokens(2, 45)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    labels = some_labels(input_ids).masked_fill(mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def whole(folder, dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return float(loss), {name: parameter.grad for name, parameter in model.named_parameters()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(folder, size, dtype, settings, sizes) -> tuple[float, dict[str, torch.Tensor]]:
    model = tensor_parallel_model(folder, dtype=dtype, **sizes)
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=size, **settings), mesh_of(model))
    with cp.shard(batch(), model) as local:
        loss = model(**local).loss
        (loss * cp.size).backward()  # FSDP takes the mean over the CP group
    loss = loss.detach()
    dist.all_reduce(loss, group=cp.groups.group)
    return float(loss), {name: full(parameter.grad) for name, parameter in model.named_parameters()}
