"""From a recipe's `model` and `lora` sections to a tokenizer and a model."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DistributedConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.schema import ModelSection

BYTES = "bytes"


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token in any case; padded labels are -100 whatever that token is.

    Raises:
        RecipeError: if it cannot be found.
    """
    source = section.tokenizer or section.name
    if source == BYTES:
        return ByT5Tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.tokenizer: {source!r} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The model's configuration, with the recipe's values in place of its own.

    Raises:
        RecipeError: if it cannot be found, is of another type than the recipe says, or refuses a value.
    """
    try:
        if section.name is None:
            return AutoConfig.for_model(section.type, **section.config)
        config, unused = AutoConfig.from_pretrained(
            section.name,
            trust_remote_code=section.trust_remote_code,
            return_unused_kwargs=True,
            **section.config,
        )
    except Exception as error:  # each configuration class validates itself, with exceptions of its own
        raise RecipeError(f"model: no configuration for {section.name or section.type!r}: {error}") from error
    if unused:
        raise RecipeError(f"model.config: the configuration of {section.name!r} has no {', '.join(unused)}.")
    if section.type not in (None, config.model_type):
        raise RecipeError(
            f"model.type: {section.name!r} is {config.model_type!r}, and the recipe says {section.type!r}."
        )
    return config


def load_model(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, distributed: DistributedConfig | None = None
) -> PreTrainedModel:
    """The causal language model, with the recipe's attention, sharded as `distributed` says.

    Raises:
        RecipeError: if it cannot be found, or embeds fewer tokens than the tokenizer makes.
    """
    config = load_config(section)
    vocabulary = config.get_text_config().vocab_size
    if vocabulary < len(tokenizer):
        raise RecipeError(
            f"model.config.vocab_size={vocabulary} is less than the {len(tokenizer)} tokens of the tokenizer."
        )
    options = {"attn_implementation": section.attention, "trust_remote_code": section.trust_remote_code}
    if section.dtype is not None:
        options["dtype"] = section.dtype
    if distributed is not None:
        options["distributed_config"] = distributed
    if section.name is None:
        return _with_random_weights(config, options)
    try:
        return AutoModelForCausalLM.from_pretrained(section.name, config=config, **options)
    except OSError as error:
        raise RecipeError(f"model.name: the weights of {section.name!r} cannot be loaded: {error}") from error


def _with_random_weights(config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """A model whose weights are the same on all ranks, which are seeded alike."""
    distributed = options.pop("distributed_config", None)
    model = AutoModelForCausalLM.from_config(config, **options)
    if distributed is None:
        return model
    # Transformers shards what it loads, and only that.
    options |= {"state_dict": model.state_dict(), "dtype": model.dtype, "distributed_config": distributed}
    return type(model).from_pretrained(None, config=model.config, **options)  # of a composite one, the text's


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with adapters to train in it, and nothing else to train.

    Raises:
        RecipeError: if the model has no place for them.
    """
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"lora: {error}") from error
