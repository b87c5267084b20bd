"""Schema of a recipe, a YAML file of sections.

OmegaConf reads the file (safe tags only), merges the overrides of the command line and resolves `${...}`. Pydantic
turns the result into the dataclasses below. Both are strict: an unknown key or a value of a wrong type is refused,
with its section and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sysconfig
import warnings
from math import prod
from typing import Annotated, Any, Literal, get_type_hints

import torch
from omegaconf import OmegaConf
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.dataclasses import dataclass
from transformers import CONFIG_MAPPING, BitsAndBytesConfig, DistributedConfig, Mxfp4Config, TrainingArguments

from hf_context_parallel.config import ContextParallelConfig

from .errors import RecipeError, did_you_mean
from .trl_columns import TEXT, TrlColumns

TRAINERS = {
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "reward": "Reward",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "orpo": "ORPO",
    "cpo": "CPO",
}
"""Trainers of TRL that a recipe can name, each with the beginning of the name of its class."""
GENERATING = ("grpo", "rloo")
"""Trainers that generate completions, and score them."""
BITSANDBYTES = "bitsandbytes"
QUANTIZATIONS = {BITSANDBYTES: BitsAndBytesConfig, "mxfp4": Mxfp4Config}
"""Configurations of quantization that a recipe can name as `quant_method`."""
DRAWN = "drawn"
"""Name for images that the recipe draws."""
PARALLEL_SIZES = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size")
"""Sizes in the section `distributed`. Their product is the number of processes."""

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=())

# ${python_path:stdlib} and the like stand for a folder of the running Python.
OmegaConf.register_resolver("python_path", sysconfig.get_path, replace=True)


def keywords_of(cls: type, **corrections: Any) -> type[BaseModel]:
    """Make a pydantic model of the keywords of the dataclass `cls`, all optional, with the types of `cls`.

    It checks keywords without building `cls`, since building `TrainingArguments` starts process groups.

    Args:
        cls: the dataclass.
        corrections: types of fields that `cls` documents but does not annotate.
    """
    hints = get_type_hints(cls) | corrections
    fields = {field.name: (hints[field.name], None) for field in dataclasses.fields(cls) if field.init}
    return create_model(cls.__name__, __config__=STRICT, **fields)


def training_keywords(arguments: type[TrainingArguments]) -> type[BaseModel]:
    """Make a pydantic model of the keywords of `TrainingArguments`, or of a subclass that TRL has."""
    return keywords_of(arguments, fsdp=bool | str | None, resume_from_checkpoint=bool | str | None)


TrainingKeywords = training_keywords(TrainingArguments)
LoraKeywords = keywords_of(LoraConfig)
DistributedKeywords = keywords_of(DistributedConfig)


@dataclass(config=STRICT)
class ModelSection:
    """Section `model`: the model, its attention and its tokenizer.

    Args:
        name: a hub id or a folder, whose weights are fine-tuned. Without it, the weights are random.
        type: the model type (`llama`, `qwen3`, ...). It is needed without `name`, and for a dry run of a hub id.
        config: values that replace those of the model's configuration.
        tokenizer: a hub id or a folder, or `bytes` for ByT5's tokenizer, which needs no file. By default `name`. For
            data with images it is that of the processor, and `bytes` makes the processor of the type without a file.
        dtype: the dtype of the weights. By default that of the checkpoint, and float32 for random weights.
        attention: the `attn_implementation`. For a composite model it is a dictionary, such as
            `{"": context_parallel, text_config: context_parallel, vision_config: sdpa}`.
        quantization: keywords of `BitsAndBytesConfig`, such as `{load_in_4bit: true}`, or of `Mxfp4Config` with
            `quant_method: mxfp4`.
        trust_remote_code: run code from the model's repository.

    Raises:
        ValueError: if a needed key is missing, `type` is unknown, or `config` or `quantization` has an unknown key.
    """

    name: str | None = None
    type: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    attention: str | dict[str, str] = "context_parallel"
    quantization: dict[str, Any] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.name is None and self.type is None:
            raise ValueError(
                "'name' and 'type' are both missing. Give 'name' (a hub id or a folder) or 'type' (random weights)."
            )
        if self.name is None and self.tokenizer is None:
            raise ValueError("'name' and 'tokenizer' are both missing. Give 'tokenizer' (`bytes` needs no file).")
        if self.type is not None and not self.trust_remote_code:
            check_model_config(self.type, self.config)
        if self.quantization is not None:
            check_quantization(self.quant_method, self.quantization)

    @property
    def quant_method(self) -> str | None:
        """Name of the quantization, or None."""
        return None if self.quantization is None else self.quantization.get("quant_method", BITSANDBYTES)

    def quantization_config(self) -> BitsAndBytesConfig | Mxfp4Config | None:
        """Build the configuration of the quantization, or return None.

        Raises:
            RecipeError: if it refuses a value, or its package is missing.
        """
        if self.quantization is None:
            return None
        keywords = {name: value for name, value in self.quantization.items() if name != "quant_method"}
        try:
            return QUANTIZATIONS[self.quant_method](**keywords)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"model.quantization: {error}. Correct it, or install what it names.") from error


def check_quantization(method: str | None, values: dict[str, Any]) -> None:
    """Check the name of a quantization and its keys. Transformers itself warns of unknown keys, and drops them.

    Raises:
        ValueError: if there is no such quantization, or it has no such key.
    """
    if method not in QUANTIZATIONS:
        raise ValueError(f"quantization.quant_method={method!r} is none of {', '.join(QUANTIZATIONS)}.")
    known = {"quant_method", *inspect.signature(QUANTIZATIONS[method]).parameters} - {"kwargs"}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key 'quantization.{key}' for {method!r}.{did_you_mean(key, known)}")


def check_model_config(model_type: str, values: dict[str, Any]) -> None:
    """Check a model type and the keys of its configuration.

    Transformers itself silently keeps a misspelt key as one more attribute.

    Raises:
        ValueError: if Transformers has no such type, or its configuration has no field for a key of `values`.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"type={model_type!r} is no model type of Transformers.{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    known = model_config_keys(model_type)
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key 'config.{key}' for the type {model_type!r}.{did_you_mean(key, known)}")


def model_config_keys(model_type: str) -> set[str]:
    """List the fields of a model type's configuration, under its own names and the names that all types share."""
    config_class = CONFIG_MAPPING[model_type]
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)


@dataclass(config=STRICT)
class DataSection:
    """Section `data`: the documents, and how they become rows.

    Args:
        path, name, split, data_files, data_dir: the arguments of `datasets.load_dataset`.
        options: further keywords of `load_dataset`, such as `{streaming: true}`.
        eval_split: the split to evaluate on, if any. `training.eval_strategy` says when.
        format: the format of a document: `text`; `chat`, a list of messages; or `tokens`, a list of token ids. With
            `tokens`, a column `labels` may hold -100 for tokens that are not to be learnt.
        column: the column of the documents. By default `text`, `messages` or `input_ids`.
        max_length: the most tokens of a row, two or more. A trainer of TRL gets it as `training.max_length`.
        packing: join documents into rows of `max_length` tokens, where no document sees another. Without packing, a
            row is one document, cut at `max_length` and padded to the longest row of its batch.
        images: the column of the images of a document: a list of images, or of their files. Then the model is an
            image-text model, which learns the text of a document, or the last message of a chat, from what comes
            before it. In a text, and in a chat that does not say where its images are, these come first. With
            `drawn`, the recipe draws the text of a document on pages, and the model learns to read them.
        image_options: keywords of the processor of images, such as `{size: {shortest_edge: 65536, longest_edge:
            1048576}}`, least and most pixels of an image for types that take images of any size.

    Raises:
        ValueError: if the format or `packing` does not fit images.
    """

    path: str
    max_length: Annotated[int, Field(ge=2)]
    name: str | None = None
    split: str = "train"
    eval_split: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    data_dir: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: Literal["text", "chat", "tokens"] = "text"
    column: str | None = None
    packing: bool = False
    images: str | None = None
    image_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images is None:
            if self.image_options:
                raise ValueError("image_options are of images. Name their column in images, or leave them out.")
            return
        if self.packing or self.format == "tokens" or (self.images == DRAWN and self.format != "text"):
            raise ValueError(
                f"images={self.images!r} does not fit format={self.format!r} and packing={self.packing}. Give texts "
                f"or chats without packing, and texts for images={DRAWN!r}."
            )


def arguments_of(trainer: str | None) -> type[TrainingArguments]:
    """Return the class of the arguments of a trainer: that of TRL, or `TrainingArguments` for None.

    Raises:
        RecipeError: if TRL has no such trainer, or is not installed.
    """
    return TrainingArguments if trainer is None else trl_classes(trainer)[1]


def trl_classes(trainer: str) -> tuple[Any, type[TrainingArguments]]:
    """Return our class of a trainer of TRL, and the class of its arguments.

    Raises:
        RecipeError: if there is no such trainer, or TRL is not installed.
    """
    if trainer not in TRAINERS:
        raise RecipeError(f"trainer: {trainer!r} is none of {', '.join(TRAINERS)}.{did_you_mean(trainer, TRAINERS)}")
    try:
        ours = importlib.import_module("hf_context_parallel.trl")
    except ImportError as error:
        raise RecipeError(f"trainer: {error}") from error
    made = getattr(ours, f"{TRAINERS[trainer]}Trainer")
    return made, ours.arguments_class(made)


@dataclass(config=STRICT)
class Recipe:
    """Fine-tuning run: model, data, training arguments and parallelism.

    Args:
        model: the model, its attention and its tokenizer.
        data: the documents, and how they become rows.
        training: keywords of `TrainingArguments`, or of the class that TRL has for its trainer.
        trainer: the trainer of TRL: `sft`, `dpo`, `kto`, `reward`, `grpo`, `rloo`, `orpo` or `cpo`. Its columns are
            named as in TRL's documentation. Without it, a causal language model learns all tokens of each document.
        rewards: with `grpo` and `rloo`, the functions that score completions, as `module:function`, or reward models
            of the hub.
        context_parallel: keywords of `ContextParallelConfig`.
        distributed: keywords of Transformers' `DistributedConfig`, which shards the model while loading it. `tp_size`
            ranks share each layer (tensor parallelism). The samples and sequences are shared by `fsdp_size` times
            `dp_replicate_size` data ranks. Without it, the model is sharded as `training` says, or not at all.
        lora: keywords of `LoraConfig`. Without it, all weights are trained.

    Raises:
        ValueError: if the sections contradict each other.
    """

    model: ModelSection
    data: DataSection
    training: TrainingKeywords = dataclasses.field(default_factory=TrainingKeywords)
    context_parallel: ContextParallelConfig = ContextParallelConfig()
    distributed: DistributedKeywords | None = None
    lora: LoraKeywords | None = None
    trainer: str | None = None
    rewards: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._check_trainer()
        attention = self.model.attention
        names = attention.values() if isinstance(attention, dict) else [attention]
        if self.context_parallel.size > 1 and "context_parallel" not in names:
            raise ValueError(
                f"model.attention={attention!r} does not split the sequence, and context_parallel.size="
                f"{self.context_parallel.size} asks for it. Set model.attention='context_parallel', or size=1."
            )
        if self.distributed is not None:
            self._check_sizes()

    def _check_trainer(self) -> None:
        if self.trainer is None and self.rewards:
            raise ValueError("rewards are scores of a trainer that generates. Add trainer: grpo, or leave them out.")
        if self.trainer is None:
            return
        if bool(self.rewards) != (self.trainer in GENERATING):
            raise ValueError(
                f"trainer={self.trainer!r} and rewards={self.rewards!r} do not fit: {' and '.join(GENERATING)} need "
                "rewards, and other trainers take none."
            )
        if self.data.format != "text" or self.data.column is not None:
            raise ValueError(
                "data.format and data.column are for recipes without a trainer of TRL, which finds its columns by "
                "their names. Leave them out."
            )
        if self.data.images is not None:
            raise ValueError("data.images is for recipes without a trainer of TRL. Leave out one of the two.")
        if self.data.packing and self.trainer != "sft":
            raise ValueError(f"data.packing=true does nothing with trainer={self.trainer!r}. Leave it out.")

    def _check_sizes(self) -> None:
        size = self.context_parallel.size
        data = self._parallel_size("fsdp_size") * self._parallel_size("dp_replicate_size")
        if data % size:
            raise ValueError(
                f"context_parallel.size={size} does not divide the {data} data ranks of 'distributed' (fsdp_size * "
                f"dp_replicate_size), which CP groups are made of. Set fsdp_size={size} or a multiple of it, and "
                "start tp_size * fsdp_size * dp_replicate_size processes."
            )
        if self.context_parallel.sequence_parallel and self.tensor_ranks == 1:
            raise ValueError(
                "context_parallel.sequence_parallel=true shards activations over the ranks of tensor parallelism, and "
                "distributed.tp_size is 1. Set tp_size to 2 or more, or sequence_parallel=false."
            )
        if self.training.fsdp:
            raise ValueError(
                f"training.fsdp={self.training.fsdp!r} and 'distributed' both shard the model. Leave training.fsdp "
                "out, and set distributed.fsdp_size."
            )

    @property
    def processes(self) -> int:
        """Number of processes of the run. Without `distributed`, a multiple of it is possible too."""
        if self.distributed is None:
            return self.context_parallel.size
        return prod(map(self._parallel_size, PARALLEL_SIZES))

    @property
    def source_of_processes(self) -> str:
        """Keys whose product is `processes`."""
        given = [f"distributed.{name}" for name in PARALLEL_SIZES if getattr(self.distributed, name, None)]
        return " * ".join(given) or "context_parallel.size"

    @property
    def tensor_ranks(self) -> int:
        """Number of ranks that share each layer."""
        return self._parallel_size("tp_size")

    def _parallel_size(self, name: str) -> int:
        return getattr(self.distributed, name, None) or 1

    def distributed_config(self) -> DistributedConfig | None:
        """Build the `DistributedConfig`, or return None if Transformers is not to shard the model.

        Raises:
            RecipeError: if `DistributedConfig` refuses a value.
        """
        if self.distributed is None:
            return None
        try:
            return DistributedConfig(**self.distributed.model_dump(exclude_unset=True))
        except ValueError as error:
            raise RecipeError(f"distributed: {error}. Correct the section 'distributed'.") from error

    def training_arguments(self, checked_for: int | None = None) -> TrainingArguments:
        """Build the `TrainingArguments`, which starts the process group of a launched run.

        Args:
            checked_for: a number of processes, to check the values for it alone: no group starts, no device is used,
                no variable is set.

        Raises:
            RecipeError: if `TrainingArguments` refuses a value.
        """
        keywords = self.training.model_dump(exclude_unset=True)
        if self.data.images is not None:
            keywords["remove_unused_columns"] = False  # the collator reads columns that the model does not take
        if self.trainer is not None:
            known = type(self.training).model_fields
            given = {"max_length": self.data.max_length, **({"packing": True} if self.data.packing else {})}
            keywords = {name: value for name, value in given.items() if name in known} | keywords
        made, before = arguments_of(self.trainer), dict(os.environ)
        if checked_for is not None:
            replaced = {"_setup_devices": torch.device("cpu"), "world_size": checked_for}
            made = type(made.__name__, (made,), {name: property(lambda _, x=x: x) for name, x in replaced.items()})
            keywords["use_cpu"] = True
        try:
            with warnings.catch_warnings():
                if checked_for is not None:
                    warnings.simplefilter("ignore")  # they come again when the run starts
                return made(**keywords)
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise RecipeError(f"training: {error}. Correct the section 'training'.") from error
        finally:
            if checked_for is not None:
                os.environ.clear()
                os.environ.update(before)

    @property
    def trl_columns(self) -> TrlColumns | None:
        """The columns of the data that the trainer of TRL reads, or None without one."""
        if self.trainer is None:
            return None
        return TrlColumns(self.trainer, getattr(self.training, "dataset_text_field", None) or TEXT)

    @classmethod
    def for_trainer(cls, trainer: str | None) -> type[Recipe]:
        """Make the class of recipes that name this trainer, whose section `training` has the keywords of TRL's class.

        Raises:
            RecipeError: if there is no such trainer, or TRL is not installed.
        """
        if trainer is None:
            return cls
        keywords = training_keywords(arguments_of(trainer))
        fields = {"__annotations__": {"training": keywords}, "training": dataclasses.field(default_factory=keywords)}
        return dataclass(config=STRICT)(type(cls.__name__, (cls,), fields | {"__module__": cls.__module__}))

    def lora_config(self) -> LoraConfig | None:
        """Build the `LoraConfig`, or return None if all weights are trained.

        Raises:
            RecipeError: if `LoraConfig` refuses a value.
        """
        if self.lora is None:
            return None
        try:
            return LoraConfig(**{"task_type": "CAUSAL_LM", **self.lora.model_dump(exclude_unset=True)})
        except ValueError as error:
            raise RecipeError(f"lora: {error}. Correct the section 'lora'.") from error
