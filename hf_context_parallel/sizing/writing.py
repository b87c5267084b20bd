"""Recipe of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..recipe.errors import RecipeError
from ..recipe.reading import load_recipe
from .plans import Plan

PARALLEL = ("fsdp", "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config")
"""Keywords of `training` that shard a model, in place of which a plan has the section `distributed`."""
CHECKPOINTING = (
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)


def write_recipe(
    path: Path, plan: Plan, described: str, source: Path | None, model: str, model_type: str, lora: int | None
) -> None:
    """Write the recipe of a plan, and read it as a run would.

    Args:
        path: the file. It must not exist.
        described: the plan in words.
        source: the recipe that was planned, of which all else is taken over. None for a model.
        model, model_type: folder or hub id of the model, and its type.
        lora: rank of the adapters, without `source`.

    Raises:
        RecipeError: if the file exists or cannot be written, or a run would refuse the recipe.
    """
    if path.exists():
        raise RecipeError(f"--write={path}: the file is there already. Name another one.")
    settings: Any = OmegaConf.load(source) if source is not None else _new(plan, model, model_type, lora)
    _set(settings, plan)
    missing = [] if source is not None else ["# Name your data in the section `data`.", "#"]
    start = (
        f"accelerate launch --multi_gpu --num_processes {plan.mesh.ranks} -m hf_context_parallel.train {path}"
        if plan.mesh.ranks > 1
        else f"hf-context-parallel train {path}"
    )
    head = [f"# {described}.", "#", *missing, f"#   {start}", ""]
    try:
        path.write_text("\n".join(head) + "\n" + OmegaConf.to_yaml(settings), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--write={path}: {error}. Name a file that can be written.") from error
    load_recipe(path).distributed_config()


def _new(plan: Plan, model: str, model_type: str, lora: int | None) -> DictConfig:
    """Settings for a model without a recipe."""
    wanted = str(plan.question.weights).removeprefix("torch.")
    settings: dict[str, Any] = {
        "model": {"name": model, "type": model_type, "dtype": wanted},
        "context_parallel": {},
        "data": {"path": "text", "data_files": ["documents.txt"], "max_length": plan.question.length},
        "training": {"output_dir": "output/planned", "logging_steps": 1},
    }
    if lora is not None:
        settings["lora"] = {"r": lora, "target_modules": "all-linear"}
    return OmegaConf.create(settings)


def _set(settings: DictConfig, plan: Plan) -> None:
    """Write a plan into the settings of a recipe."""
    mesh, choice, asked = plan.mesh, plan.choice, plan.question
    settings.data.max_length = asked.length
    cp: dict[str, Any] = {"size": mesh.cp, "comm_type": mesh.comm_type}
    if mesh.comm_type == "a2a+p2p":
        cp["a2a_size"] = mesh.inner
    cp["attention_checkpoints"] = choice.kept
    if choice.tile_tokens is not None:
        cp["tile_tokens"] = choice.tile_tokens
    ours = settings.get("context_parallel") or {}
    kept = {name: value for name, value in ours.items() if name not in (*cp, *_PLANNED)}
    settings.context_parallel = {**kept, **cp}
    settings.pop("distributed", None)
    if mesh.tp > 1 or mesh.fsdp > 1:
        sizes = {"tp_size": mesh.tp, "fsdp_size": mesh.fsdp, "dp_replicate_size": mesh.replicas}
        settings.distributed = {name: size for name, size in sizes.items() if size > 1 or name == "fsdp_size"}
    training = settings.training
    for name in (*PARALLEL, *CHECKPOINTING):
        training.pop(name, None)
    training.bf16 = True
    training.per_device_train_batch_size = asked.rows
    training.gradient_accumulation_steps = asked.runs(mesh)
    keywords: dict[str, Any] = {"use_reentrant": False}
    if choice.offload:
        keywords["offload"] = True
    training.gradient_checkpointing = True
    training.gradient_checkpointing_kwargs = keywords


_PLANNED = ("a2a_size", "attention_checkpoints", "tile_tokens")
"""Settings of CP that a plan leaves out where it does not need them."""
