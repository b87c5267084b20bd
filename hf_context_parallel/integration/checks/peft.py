"""Check of PEFT tuners: those that change the loss, draw random weights, or count positions of a shard are refused."""

from __future__ import annotations

import torch

from ...compat import base_tuner

RANDOM_WEIGHTS = ("rank_dropout", "module_dropout", "monteclora_config")
"""Options that make weights random. Each rank would draw other weights for the same sequence."""
WHOLE_POSITIONS = ("alora_invocation_tokens",)
"""Options of adapters that act from a token on, whose place they count in whole rows."""


X_LORA = "XLORA"
"""The type of a tuner that weighs the adapters of each token by an earlier pass over whole rows."""


def check_tuners(model: torch.nn.Module) -> None:
    """Refuse tuners whose results on shards do not add up to those of one process.

    Args:
        model: the model with the tuners around it. They are given the batch of a shard.

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
                "its shard, so the sum would count it once for each rank. Take another tuner, such as LoRA, or "
                "prepare the model by hf_context_parallel.parallelize and call it with whole batches."
            )
        check_adapters(part)


def check_adapters(model: torch.nn.Module) -> None:
    """Refuse adapters of a model that do not act on each token of a shard as on the same token of the whole batch.

    Args:
        model: the model that PEFT has put adapters into, or the tuner around it.

    Raises:
        ValueError: naming the adapter and its option.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "peft_type", None) == X_LORA:
            raise ValueError(
                f"the adapter {name!r} is of X-LoRA, which weighs adapters by the hidden states of whole rows, and a "
                "layer has those of a shard. Take LoRA, or run the model in `with cp.whole(model):`."
            )
        for option in RANDOM_WEIGHTS:
            value = getattr(config, option, None)
            if model.training and value:
                raise ValueError(
                    f"the adapter {name!r} has {option}={value!r}, which draws random weights, and other ones on "
                    f"each rank. Leave {option} out."
                )
        for option in WHOLE_POSITIONS:
            value = getattr(config, option, None)
            if value:
                raise ValueError(
                    f"the adapter {name!r} has {option}={value!r}: it acts from a place in the whole row on, and a "
                    f"shard has other places. Leave {option} out, or run the model in `with cp.whole(model):`."
                )
