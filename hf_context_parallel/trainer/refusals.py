"""Arguments of the Trainer that are known to be wrong on shards."""

from __future__ import annotations

from transformers import Trainer

from ..config import ContextParallelConfig, refuse
from ..distributed.mesh import mesh_of


def check_trainer(trainer: Trainer, config: ContextParallelConfig) -> None:
    """Refuse what is known to be wrong on shards before anything is trained.

    Raises:
        ValueError: naming the argument, and what to do.
    """
    cases = (
        (
            trainer.label_smoother is not None,
            f"label_smoothing_factor={trainer.args.label_smoothing_factor} shifts labels itself; set it to 0",
        ),
        (
            trainer.compute_loss_func is not None,
            "compute_loss_func gets a shard's outputs and labels that are shifted already; override compute_loss "
            "instead, and begin with super().compute_loss",
        ),
        (
            getattr(trainer.args, "train_sampling_strategy", None) == "batch_rebalance",
            "train_sampling_strategy='batch_rebalance' deals samples to ranks and not to CP groups; use another",
        ),
        (
            trainer.args.neftune_noise_alpha is not None,
            f"neftune_noise_alpha={trainer.args.neftune_noise_alpha} scales noise by the length it sees, which is a "
            "shard's; set it to None",
        ),
        (
            trainer.label_names != ["labels"],
            f"label_names={trainer.label_names} are not known to be sharded; only ['labels'] is",
        ),
        (trainer.args.n_gpu > 1, "one process sees several GPUs; start one process a GPU with `accelerate launch`"),
        (
            trainer.model_init is not None and mesh_of(trainer.model) is not None,
            "model_init makes a model that Transformers shards, and its mesh is needed before; pass a model",
        ),
        (
            mesh_of(trainer.model) is not None and not hasattr(trainer, "is_distributed_loading_by_transformers"),
            "the Trainer of this version of Transformers wraps a model that was sharded as it was loaded once "
            "more; upgrade Transformers, or load the model whole and shard it by training.fsdp",
        ),
        (trainer.args.eval_use_gather_object, "eval_use_gather_object gathers from every rank; set it to False"),
    )
    refuse(cases, "context parallelism: {}.")
    if config.dynamic:
        cases = (
            (not trainer.args.average_tokens_across_devices, "needs average_tokens_across_devices=True"),
            (not trainer.model_accepts_loss_kwargs, "needs a model whose loss is divided by num_items_in_batch"),
        )
        refuse(cases, "context parallelism: dynamic=True {}, or set dynamic=False.")
