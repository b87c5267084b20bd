"""Check of PEFT tuners: those that change the loss, draw random weights, or count positions of a shard are refused."""

from __future__ import annotations

import torch

from ...compat import base_tuner

RANDOM_WEIGHTS = ("rank_dropout", "module_dropout", "monteclora_config")
"""Options that make weights random. Each rank would draw other weights for the same sequence."""
WHOLE_POSITIONS = ("alora_invocation_tokens",)
"""Options of adapters that act from a token on, whose place they count in whole rows."""
WHOLE_BATCHES = {
    "XLORA": "weighs adapters by the hidden states of whole rows",
    "LILY": "weighs its experts by a mean over all tokens of a batch",
}
"""Types of tuners that look at more than one token at a time, each with what it does."""


PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""Types of tuners that put keys and values before those of each row."""


def check_loss_of_tuners(model: torch.nn.Module, logits: str) -> None:
    """Refuse tuners that compute a loss of their own from logits, if the model returns none in training.

    Args:
        model: the model with the tuners around it.
        logits: the `logits` of `ContextParallelConfig`.

    Raises:
        ValueError: naming the tuner.
    """
    for part in model.modules():
        configs = getattr(part, "peft_config", None)
        for name, config in (configs if isinstance(configs, dict) else {}).items():
            if _kind(config) == "CPT" and logits == "auto":
                raise ValueError(
                    f"the adapter {name!r} is of the type CPT, which computes its loss from logits, and with "
                    "logits='auto' none are made in training. Set ContextParallelConfig(logits='whole')."
                )


def uses_prefix(model: torch.nn.Module) -> bool:
    """Return whether a tuner puts keys and values before those of each row."""
    configs = (getattr(part, "peft_config", None) for part in model.modules())
    return any(_kind(x) in PREFIXES for found in configs if isinstance(found, dict) for x in found.values())


def _kind(config: object) -> str:
    """Return the type of a tuner by the name that PEFT gives it."""
    return str(getattr(getattr(config, "peft_type", None), "value", ""))


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
        kind = _kind(config)
        if kind in WHOLE_BATCHES:
            raise ValueError(
                f"the adapter {name!r} is of the type {kind}, which {WHOLE_BATCHES[kind]}, and a layer has those of a "
                "shard. Take LoRA, or run the model in `with cp.whole(model):`."
            )
        if kind == "POLY" and model.training:
            raise ValueError(
                f"the adapter {name!r} is of the type POLY, which draws which of its modules it takes, and each rank "
                "would draw other ones. Take LoRA."
            )
        compressed = getattr(getattr(config, "velora_config", None), "init_type", "random")
        if compressed != "random" and model.training:
            raise ValueError(
                f"the adapter {name!r} has velora_config with init_type={compressed!r}, which projects by a mean over "
                "all tokens of a batch, and a layer has those of a shard. Set init_type='random'."
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
