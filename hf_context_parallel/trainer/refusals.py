"""Refusal of Trainer arguments that would give wrong results on shards."""

from __future__ import annotations

from accelerate import Accelerator, ParallelismConfig
from accelerate.state import PartialState
from transformers import Trainer, TrainingArguments

from ..compat import require
from ..config import ContextParallelConfig, refuse
from ..distributed.mesh import mesh_of

UNDOCUMENTED = {
    Trainer: (
        "create_accelerator_and_postprocess",
        "_build_accelerator_args",
        "_prepare_context_parallel_inputs",
        "_get_num_items_in_batch",
        "_load_rng_state",
        "_finalize_training",
        "_maybe_log_save_evaluate",
        "_run_epoch",
        "_get_output_dir",
        "_save_checkpoint",
        "_save",
        "_push_from_checkpoint",
        "_load_from_checkpoint",
        "_load_best_model",
        "_load_optimizer_and_scheduler",
    ),
    Accelerator: ("_prepare_cp", "_prepare_deepspeed"),
    ParallelismConfig: ("_validate_accelerator",),
    PartialState: ("_shared_state",),
}
"""Undocumented members that the mixin, or a class that it uses, overrides or reads."""


def check_versions() -> None:
    """Refuse versions of Transformers and accelerate whose Trainer would not call the methods of the mixin.

    Raises:
        ValueError: with the name that is missing.
    """
    require(UNDOCUMENTED, "ContextParallelTrainer")


def check_trainer(trainer: Trainer, config: ContextParallelConfig) -> None:
    """Refuse Trainer arguments that would give wrong results on shards.

    Raises:
        ValueError: with the argument, and how to change it.
    """
    cases = (
        (
            getattr(trainer.args, "train_sampling_strategy", None) == "batch_rebalance",
            "train_sampling_strategy='batch_rebalance' deals samples to ranks and not to CP groups. Leave it at "
            "its default",
        ),
        (
            trainer.args.n_gpu > 1,
            f"one process sees {trainer.args.n_gpu} GPUs. Start one process per GPU with `accelerate launch`",
        ),
        (
            trainer.model_init is not None and mesh_of(trainer.model) is not None,
            "model_init makes a model that Transformers shards, and the Trainer needs its mesh earlier. Pass a model",
        ),
        (
            mesh_of(trainer.model) is not None and not hasattr(trainer, "is_distributed_loading_by_transformers"),
            "the Trainer of this version of Transformers shards a model again that was sharded while loading. Upgrade "
            "Transformers, or load the model whole and shard it by training.fsdp",
        ),
        (
            trainer.args.eval_use_gather_object,
            "eval_use_gather_object=True gathers samples from every rank of a CP group. Set it to False",
        ),
    )
    refuse(cases, "context parallelism: {}.")
    if config.dynamic:
        cases = (
            (
                any(base.__module__.split(".")[0] == "trl" for base in type(trainer).__mro__),
                "another trainer: those of TRL log the mean over their calls, which get other rows. Use "
                "ContextParallelTrainer",
            ),
            (
                trainer.is_deepspeed_enabled,
                "DDP or FSDP2, since DeepSpeed counts each run of the model as a step of accumulation. Use FSDP2",
            ),
            (
                trainer.args.label_smoothing_factor and not trainer.model_accepts_loss_kwargs,
                f"label_smoothing_factor=0, where it is {trainer.args.label_smoothing_factor}: this model's loss is a "
                "mean over each batch, and smoothed losses are not weighed. Set that",
            ),
            (
                not trainer.args.average_tokens_across_devices,
                "average_tokens_across_devices=True. Set that",
            ),
        )
        refuse(cases, "context parallelism: dynamic=True needs {}, or set dynamic=False.")


def use_unused_parameters(args: TrainingArguments) -> None:
    """Let DDP find the parameters of towers that a group without media does not use.

    Raises:
        ValueError: if the arguments say not to, or ask for a checkpointing that cannot go with it.
    """
    if args.ddp_find_unused_parameters is False:
        raise ValueError(
            "dynamic=True gives media to some groups and none to others, and ddp_find_unused_parameters=False lets "
            "DDP wait for gradients of towers that groups without media do not have. Leave it out, freeze the towers, "
            "or set dynamic=False."
        )
    names = ("activation_checkpointing", "gradient_checkpointing")  # the new name, and that of older versions
    options = next((x for name in names if (x := getattr(args, f"{name}_kwargs", None))), {})
    if any(getattr(args, name, False) for name in names) and options.get("use_reentrant"):
        raise ValueError(
            "dynamic=True with towers that are trained needs ddp_find_unused_parameters, which does not go with "
            "reentrant checkpointing. Set gradient_checkpointing_kwargs={'use_reentrant': False}, or dynamic=False."
        )
    args.ddp_find_unused_parameters = True
