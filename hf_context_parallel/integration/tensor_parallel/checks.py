"""Checks of a model that Transformers has sharded by tensor parallelism."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ...compat import layer_configs, tensor_parallel_size
from ...cp_group import CPGroup
from ...distributed.mesh import mesh_of
from ..model_registry import CHECKED_AS, known_tensor_parallel, transformers_model
from ..switches import switches
from .plan_styles import styles_of
from .sequence_parallel import parts

KEYS = ("k_proj", "qkv_proj", "query_key_value")
"""Ends of the names of layers that make keys. Their outputs are sharded by heads."""


def check_parallelism(model: torch.nn.Module, group: CPGroup) -> None:
    """Refuse a model whose sharding by Transformers is not exact, or does not fit the mesh of the group.

    Raises:
        ValueError: naming the setting, and what to do.
    """
    inner = transformers_model(model)
    asked = getattr(inner.config, "distributed_config", None)
    tp_size = tensor_parallel_size(inner)
    if group.config.sequence_parallel and tp_size == 1:
        raise ValueError(
            "sequence_parallel=True shards activations over the ranks of tensor parallelism, and "
            f"{type(inner).__name__} was loaded without tensor parallelism. Load it with "
            "distributed_config=DistributedConfig(tp_size=..., fsdp_size=...), or leave sequence_parallel off."
        )
    if asked is not None and getattr(asked, "enable_sequence_parallel", False) and not group.config.sequence_parallel:
        raise ValueError(
            "DistributedConfig(enable_sequence_parallel=True) does nothing in Transformers. Set "
            "ContextParallelConfig(sequence_parallel=True), which does it, or leave both off."
        )
    if getattr(asked, "pp_size", None) not in (None, 1):
        raise ValueError(
            f"pp_size={asked.pp_size}: with pipeline parallelism a rank runs some of the layers, and loss and "
            "backward have not been found exact on shards. Take pp_size=1."
        )
    if tp_size == 1:
        return
    _check_mesh(inner, tp_size, group)
    _check_heads(inner, tp_size)
    if getattr(asked, "tp_plan", None) not in (None, "auto"):
        raise ValueError(
            f"tp_plan={asked.tp_plan}: only the plan that Transformers has for {inner.config.model_type!r} has been "
            "compared with one process. Leave tp_plan out."
        )
    if group.config.sequence_parallel:
        parts(inner)
    check_tensor_parallel_type(inner.config.model_type, group.config.sequence_parallel)


def _check_mesh(model: PreTrainedModel, tp_size: int, group: CPGroup) -> None:
    mesh = mesh_of(model)
    tensor = group.groups.tensor
    theirs = dist.get_process_group_ranks(mesh.get_group("tp"))
    if tensor.size == 1 or dist.get_process_group_ranks(tensor.group) != theirs:
        raise ValueError(
            f"the model is tensor-parallel (tp_size={tp_size}), and this ContextParallel was made without the mesh of "
            "the model, so that their groups do not match. Make it with "
            "ContextParallel(config, mesh=hf_context_parallel.mesh_of(model))."
        )


def _check_heads(model: PreTrainedModel, tp_size: int) -> None:
    """Refuse numbers of heads that the TP size does not divide, as some heads would be cut in two."""
    names = {module: name for name, module in model.named_modules()}
    styles = styles_of(model)
    if not any(style == "colwise" and names[module].endswith(KEYS) for module, style in styles.items()):
        return
    config = model.config.get_text_config()
    for layer, field in product(layer_configs(config), ("num_attention_heads", "num_key_value_heads")):
        heads = getattr(layer, field, None)
        if isinstance(heads, int) and heads % tp_size:
            raise ValueError(
                f"tp_size={tp_size} does not divide {field}={heads} of {type(config).__name__}, and a rank of tensor "
                f"parallelism holds whole heads. Take a tp_size that divides {heads}."
            )


def check_tensor_parallel_type(name: str, sequence_parallel: bool) -> None:
    """Refuse a model type that has not been found exact with tensor parallelism.

    Raises:
        ValueError: with the reason, and what to do.
    """
    name = CHECKED_AS.get(name, name)
    found = known_tensor_parallel().get(name, {})
    if switches.unchecked_models or found.get("sequence_parallel" if sequence_parallel else "state") == "exact":
        return
    what = "sequence_parallel=True" if found.get("state") == "exact" else "tensor parallelism (tp_size > 1)"
    reason = found.get("reason") or "it has not been compared with one process, or was not found exact"
    raise ValueError(
        f"model type {name!r} is refused with {what}: {reason}. "
        f"{'Leave sequence_parallel off' if found.get('state') == 'exact' else 'Load it with tp_size=1'}, or run "
        f"`hf-context-parallel check {name} --tp 2` to compare it."
    )
