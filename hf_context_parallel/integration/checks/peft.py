"""What PEFT's tuners do to a model, and what of it a shard would change."""

from __future__ import annotations

import sys

import torch

RANDOM_WEIGHTS = ("rank_dropout", "module_dropout", "monteclora_config")
"""Options by which weights are random: ranks draw on their own, and would compute one sequence with different ones."""


def check_tuners(model: torch.nn.Module) -> None:
    """Refuse tuners whose results on shards do not add up to those of one process.

    Raises:
        ValueError: naming the tuner or its option.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # which is there if any of its tuners is
    if tuners is None:
        return
    for part in model.modules():
        if not isinstance(part, tuners.BaseTuner):
            continue
        if type(part).forward is not tuners.BaseTuner.forward:  # AdaLoRA adds a term of the weights to the loss
            raise ValueError(
                f"{type(part).__name__} does more than calling the model: each rank would add it to its shard's loss, "
                "and it would count once a rank. Take another tuner, such as LoRA."
            )
        for name, config in part.peft_config.items():
            for option in RANDOM_WEIGHTS:
                value = getattr(config, option, None)
                if model.training and value:
                    raise ValueError(
                        f"the adapter {name!r} has {option}={value!r}, which makes weights random, on each rank "
                        "others. Leave it out."
                    )
