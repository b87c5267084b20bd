"""Refusal of Trainer arguments that would give wrong results on shards."""

from __future__ import annotations

from transformers import Trainer

from ..config import ContextParallelConfig, refuse
from ..distributed.mesh import mesh_of


def check_trainer(trainer: Trainer, config: ContextParallelConfig) -> None:
    """Refuse Trainer arguments that would give wrong results on shards.

    Raises:
        ValueError: with the argument, and how to change it.
    """
    cases = (
        (
            trainer.label_smoother is not None,
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} shifts labels within a shard. Set it to 0",
        ),
        (
            trainer.compute_loss_func is not None,
            "compute_loss_func would get the outputs of a shard, and labels that are already shifted. Override "
            "compute_loss instead, and begin with super().compute_loss",
        ),
        (
            getattr(trainer.args, "train_sampling_strategy", None) == "batch_rebalance",
            "train_sampling_strategy='batch_rebalance' deals samples to ranks and not to CP groups. Use another",
        ),
        (
            trainer.args.neftune_noise_alpha is not None,
            f"neftune_noise_alpha={trainer.args.neftune_noise_alpha} would scale noise by the length of a shard. Set "
            "it to None",
        ),
        (
            trainer.label_names != ["labels"],
            f"label_names={trainer.label_names} cannot be sharded. Use ['labels']",
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
                not trainer.args.average_tokens_across_devices,
                "average_tokens_across_devices=True. Set that",
            ),
            (
                not trainer.model_accepts_loss_kwargs,
                "a model whose loss is divided by num_items_in_batch. Use such a model",
            ),
        )
        refuse(cases, "context parallelism: dynamic=True needs {}, or set dynamic=False.")
