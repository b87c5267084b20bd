"""Tokenizer and model of a recipe, from its sections `model` and `lora`."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ByT5Tokenizer,
    DistributedConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_context_parallel.compat import layer_configs
from hf_context_parallel.config import LAYER_TYPES, ContextParallelConfig
from hf_context_parallel.integration.checks.model import check_config
from hf_context_parallel.integration.model_registry import CHECKED_AS, REFUSED, is_decided, known_decoders
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.schema import ModelSection

BYTES = "bytes"
"""Name of ByT5's tokenizer, which needs no file."""
MARKS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
    "vision_start_token": "<vision_start>",
    "vision_end_token": "<vision_end>",
}
"""Tokens that stand for images or mark their ends, by the names that processors read, which ByT5's tokenizer gains."""


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer. If it has no padding token, its end-of-sequence token is used.

    Labels of padding are -100 for every padding token.

    Raises:
        RecipeError: if the tokenizer cannot be loaded.
    """
    source = section.tokenizer or section.name
    if source == BYTES:
        return ByT5Tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # tokenizers raise exceptions of many kinds
        raise RecipeError(
            f"model.tokenizer: {source!r} cannot be loaded ({error}). Give a folder or a hub id with a tokenizer."
        ) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise RecipeError(
            f"model.tokenizer: {source!r} has no vocabulary, so that no text has tokens. Give a folder or a hub "
            "id with the files of a tokenizer, such as tokenizer.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(section: ModelSection) -> PreTrainedConfig:
    """Load the configuration of the model, changed by the values of the recipe.

    Raises:
        RecipeError: if the configuration cannot be loaded, has another type than the recipe says, or refuses a value.
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
    except Exception as error:  # configuration classes raise exceptions of many kinds
        raise RecipeError(
            f"model: no configuration for {section.name or section.type!r} ({error}). Correct model.name, model.type "
            "or model.config."
        ) from error
    if unused:
        raise RecipeError(
            f"model.config: the configuration of {section.name!r} has no {', '.join(unused)}. Remove or correct it."
        )
    if section.type not in (None, config.model_type):
        raise RecipeError(
            f"model.type: {section.name!r} is {config.model_type!r}, and the recipe says {section.type!r}. Correct "
            "model.type, or leave it out."
        )
    return config


def tokenizer_with_marks() -> PreTrainedTokenizerBase:
    """Make ByT5's tokenizer with the tokens of images, `MARKS`, in place of those that it has without a meaning."""
    return ByT5Tokenizer(extra_special_tokens=MARKS)


def name_marks(config: PreTrainedConfig) -> None:
    """Set the ids of the tokens of images in a configuration to those of `tokenizer_with_marks`."""
    tokenizer = tokenizer_with_marks()
    for name, token in MARKS.items():
        for field in (f"{name}_id", f"{name}_index"):
            if hasattr(config, field):
                setattr(config, field, tokenizer.convert_tokens_to_ids(token))


def load_model(
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    distributed: DistributedConfig | None = None,
    is_reward: bool = False,
    is_image_text: bool = False,
) -> PreTrainedModel:
    """Load the model with the recipe's attention, sharded as `distributed` says.

    It is a causal language model by default.

    Args:
        is_reward: True for a reward model, which has one output in place of the head.
        is_image_text: True for an image-text model.

    Raises:
        RecipeError: if the model cannot be loaded, is of another kind, or its vocabulary is smaller than that of the
            tokenizer.
    """
    config = load_config(section)
    suited(config, section, len(tokenizer), is_image_text)
    if is_image_text and section.tokenizer == BYTES:
        name_marks(config)
    options = {"attn_implementation": section.attention, "trust_remote_code": section.trust_remote_code}
    if section.dtype is not None:
        options["dtype"] = section.dtype
    if section.quantization is not None:
        options["quantization_config"] = section.quantization_config()
    if distributed is not None:
        options["distributed_config"] = distributed
    auto = AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM
    auto = AutoModelForSequenceClassification if is_reward else auto
    if is_reward:
        config.num_labels = 1
    if section.name is None:
        return _with_random_weights(config, options, auto)
    try:
        return auto.from_pretrained(section.name, config=config, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RecipeError(
            f"model.name: the weights of {section.name!r} cannot be loaded ({error}). Give a folder or a hub id with "
            "weights."
        ) from error


def suited(
    config: PreTrainedConfig,
    section: ModelSection,
    tokens: int | None,
    is_image_text: bool,
    context_parallel: ContextParallelConfig | None = None,
) -> None:
    """Refuse a configuration whose model recipes cannot train.

    Args:
        config: the configuration of the model.
        tokens: the number of tokens of the tokenizer, if it is known.
        is_image_text: True if the model is to take images.
        context_parallel: the CP settings, if they are to be compared with the layers of the model.

    Raises:
        RecipeError: naming the type or the value.
    """
    text = config.get_text_config()
    known = section.trust_remote_code
    if is_image_text and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not known:
        raise RecipeError(
            f"model: {config.model_type!r} takes no images, which data.images names. Name a type that "
            "AutoModelForImageTextToText knows, or leave out data.images."
        )
    if not is_image_text and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not known:
        raise RecipeError(
            f"model: {config.model_type!r} has no causal language model, which recipes train. Name a type that "
            "AutoModelForCausalLM knows."
        )
    if tokens is not None and text.vocab_size < tokens:
        raise RecipeError(
            f"model.config.vocab_size={text.vocab_size} is less than the {tokens} tokens of the tokenizer. Raise "
            "it, or name another tokenizer."
        )
    for layer in layer_configs(text):
        _check_sizes(layer)
    if context_parallel is None:
        return
    try:
        context_parallel.check_layers(getattr(text, "num_hidden_layers", None))
        for layer_type in {*(getattr(text, "layer_types", None) or ())} & {*LAYER_TYPES}:
            if isinstance(context_parallel.comm_type, Mapping):
                context_parallel.comm_type_of(layer_type, None)
    except ValueError as error:
        raise RecipeError(f"context_parallel: {error}") from error
    for part in (text, config):
        name = CHECKED_AS.get(part.model_type, part.model_type)
        if name in REFUSED or is_decided(name):
            try:
                check_config(part, known_decoders())
            except ValueError as error:
                raise RecipeError(f"model: {error}") from error


def _check_sizes(config: PreTrainedConfig) -> None:
    """Refuse a configuration without layers, or with heads that do not divide."""
    layers, width, heads, keys = (
        getattr(config, name, None)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    for name, size in (("num_hidden_layers", layers), ("hidden_size", width), ("num_attention_heads", heads)):
        if isinstance(size, int) and size < 1:
            raise RecipeError(f"model.config.{name}={size}: a model needs at least 1. Raise it.")
    if not isinstance(heads, int):
        return
    if isinstance(width, int) and getattr(config, "head_dim", None) is None and width % heads:
        raise RecipeError(
            f"model.config: num_attention_heads={heads} does not divide hidden_size={width}. Correct one of the two."
        )
    if isinstance(keys, int) and (keys < 1 or heads % keys):
        raise RecipeError(
            f"model.config: num_key_value_heads={keys} does not divide num_attention_heads={heads}. Correct one of "
            "the two."
        )


def check_weights(folder: Path) -> None:
    """Refuse a folder whose safetensors files cannot be read, or which lacks one that its index names.

    Raises:
        RecipeError: naming the file.
    """
    index = folder / "model.safetensors.index.json"
    named: set[str] = set()
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise RecipeError(
                f"model.name: {index} is no index of weights ({error}). Copy the model again."
            ) from error
    for path in sorted({folder / name for name in named} | {*folder.glob("*.safetensors")}):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise RecipeError(
                f"model.name: {path} cannot be read as weights ({error}). Copy the model again."
            ) from error


def _with_random_weights(config: PreTrainedConfig, options: dict[str, Any], auto: Any) -> PreTrainedModel:
    """Make a model with random weights, which are the same on all ranks because these have the same seed."""
    while_loading = {
        name: options.pop(name) for name in ("distributed_config", "quantization_config") if name in options
    }
    model = auto.from_config(config, **options)
    if not while_loading:
        return model
    # Transformers shards and quantises a model only while loading it.
    options |= {"state_dict": model.state_dict(), "dtype": model.dtype, **while_loading}
    return type(model).from_pretrained(None, config=model.config, **options)  # a composite model's text model


@contextmanager
def with_a_name(model: PreTrainedModel, training: TrainingArguments) -> Iterator[None]:
    """Give a model with random weights a name in this block: that of a folder, of which TRL loads a reference model.

    All processes of the run enter it.
    """
    # The first rank alone saves. In a dry run each process has an output folder of its own.
    [folder] = broadcast_object_list([str(Path(training.output_dir) / ".reference")])
    model.save_pretrained(folder)
    training.distributed_state.wait_for_everyone()
    model.config.name_or_path = folder
    try:
        yield
        training.distributed_state.wait_for_everyone()
    finally:
        model.config.name_or_path = ""
        if training.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)


def load_reward(name: str) -> Any:
    """Load a reward: a function that is named `module:function`. Other names are those of models, which TRL loads.

    Raises:
        RecipeError: if there is no such function.
    """
    module, colon, function = name.partition(":")
    if not colon:
        return name
    sys.path.insert(0, os.getcwd())  # where `python -m` would look for it
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"rewards: {name!r} cannot be loaded ({error}). Give module:function.") from error


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add LoRA adapters to the model, and freeze all other weights.

    Raises:
        RecipeError: if the model has none of the modules that the adapters are for.
    """
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"lora: {error}. Correct the section 'lora'.") from error
