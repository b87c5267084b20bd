"""Check of PEFT tuners: those that change the loss, or draw random weights, are refused."""

from __future__ import annotations

import torch

from ...compat import base_tuner

RANDOM_WEIGHTS = ("rank_dropout", "module_dropout", "monteclora_config")
"""Options that make weights random. Each rank would draw other weights for the same sequence."""


def check_tuners(model: torch.nn.Module) -> None:
    """Refuse tuners whose results on shards do not add up to those of one process.

    Raises:
        ValueError: naming the tuner or its option.
    """
    tuner = base_tuner()
    if tuner is None:
        return
    for part in model.modules():
        if not isinstance(part, tuner):
            continue
        if type(part).forward is not tuner.forward:  # AdaLoRA adds a term of the weights to the loss
            raise ValueError(
                f"{type(part).__name__} does more than calling the model: each rank would add a term to the loss of "
                "its shard, so the sum would count it once for each rank. Take another tuner, such as LoRA."
            )
        for name, config in part.peft_config.items():
            for option in RANDOM_WEIGHTS:
                value = getattr(config, option, None)
                if model.training and value:
                    raise ValueError(
                        f"the adapter {name!r} has {option}={value!r}, which draws random weights, and other ones on "
                        f"each rank. Leave {option} out."
                    )
