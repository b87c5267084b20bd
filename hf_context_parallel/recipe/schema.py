"""What a recipe may say, and how it is read.

A recipe is a YAML file of six sections. OmegaConf reads it (safe tags only), merges the overrides of the command
line and resolves `${...}`; pydantic turns the result into the dataclasses below. Both are strict: an unknown or
ill-typed key is refused and named, with its section and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from math import prod
from typing import Any, Literal, get_type_hints

from omegaconf import OmegaConf
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, PositiveInt, create_model
from pydantic.dataclasses import dataclass
from transformers import CONFIG_MAPPING, DistributedConfig, TrainingArguments

from hf_context_parallel.config import ContextParallelConfig

from .errors import RecipeError, did_you_mean

PARALLEL_SIZES = ("tp_size", "fsdp_size", "dp_replicate_size", "pp_size")
"""The sizes of `distributed`, whose product is the number of processes."""

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=())

# Names a folder of the running Python, such as ${python_path:stdlib}.
OmegaConf.register_resolver("python_path", sysconfig.get_path, replace=True)


def keywords_of(cls: type, **corrections: Any) -> type[BaseModel]:
    """A model that takes the keywords of the dataclass `cls`, each optional and typed as `cls` types it.

    It checks them without building `cls`, whose construction may start process groups. `corrections` are types that
    `cls` documents but does not annotate.
    """
    hints = get_type_hints(cls) | corrections
    fields = {field.name: (hints[field.name], None) for field in dataclasses.fields(cls) if field.init}
    return create_model(cls.__name__, __config__=STRICT, **fields)


TrainingKeywords = keywords_of(TrainingArguments, fsdp=bool | str | None)
LoraKeywords = keywords_of(LoraConfig)
DistributedKeywords = keywords_of(DistributedConfig)


@dataclass(config=STRICT)
class ModelSection:
    """The model, its attention and its tokenizer.

    Args:
        name: a hub id or a folder, whose weights are fine-tuned. Without it the weights are random.
        type: the architecture (`llama`, `qwen3`, ...). Needed where there is no `name`, and by a dry run of a hub id.
        config: values that replace those of the model's own configuration.
        tokenizer: a hub id or a folder; `bytes` is ByT5's, which needs no file. Without it, `name`.
        dtype: of the weights. Without it, what the checkpoint has, or float32 for random weights.
        attention: `attn_implementation`; a dictionary for a composite model, such as
            `{"": context_parallel, text_config: context_parallel, vision_config: sdpa}`.
        trust_remote_code: run the code that the model's repository ships.
    """

    name: str | None = None
    type: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    attention: str | dict[str, str] = "context_parallel"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.name is None and self.type is None:
            raise ValueError("name one of 'name' (a hub id or a folder) and 'type' (an architecture, random weights).")
        if self.name is None and self.tokenizer is None:
            raise ValueError("a model without 'name' has no tokenizer; name one (`tokenizer: bytes` needs no file).")
        if self.type is not None and not self.trust_remote_code:
            check_model_config(self.type, self.config)


def check_model_config(model_type: str, values: dict[str, Any]) -> None:
    """Raises ValueError if `model_type` is no architecture, or its configuration has no field for a key of `values`.

    Transformers itself keeps a misspelt key as one more attribute, without a word.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"type={model_type!r} is no architecture of Transformers.{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    known = model_config_keys(model_type)
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key 'config.{key}' for the type {model_type!r}.{did_you_mean(key, known)}")


def model_config_keys(model_type: str) -> set[str]:
    """The fields of an architecture's configuration, under its own names and those that all architectures share."""
    config_class = CONFIG_MAPPING[model_type]
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)


@dataclass(config=STRICT)
class DataSection:
    """The documents, and how they become rows.

    Args:
        path, name, split, data_files, data_dir: what `datasets.load_dataset` takes.
        options: further keywords of `load_dataset`, such as `{streaming: true}`.
        eval_split: the split to evaluate on, if any; when is `training.eval_strategy`'s to say.
        format: what a row holds. `text`; `chat`, a list of messages; or `tokens`, a list of token ids, with a column
            `labels` beside it where some of them are not to be learnt (-100).
        column: where it is. Without it, `text`, `messages` or `input_ids`.
        max_length: tokens a row.
        packing: join documents to rows of `max_length` tokens, where no document sees another. Without it, a row is
            one document, cut at `max_length` and padded to the longest of its batch.
    """

    path: str
    max_length: PositiveInt
    name: str | None = None
    split: str = "train"
    eval_split: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    data_dir: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: Literal["text", "chat", "tokens"] = "text"
    column: str | None = None
    packing: bool = False


@dataclass(config=STRICT)
class Recipe:
    """A fine-tuning run: what to train, on what, and how. `lora` absent: all weights are trained.

    `distributed` is Transformers' `DistributedConfig`, by which the model is sharded as it is loaded: `tp_size` ranks
    share each layer (tensor parallelism) and `fsdp_size` ranks, `dp_replicate_size` times, the samples and sequences.
    Absent: by what `training` says, or not at all.
    """

    model: ModelSection
    data: DataSection
    training: TrainingKeywords = dataclasses.field(default_factory=TrainingKeywords)
    context_parallel: ContextParallelConfig = ContextParallelConfig()
    distributed: DistributedKeywords | None = None
    lora: LoraKeywords | None = None

    def __post_init__(self) -> None:
        attention = self.model.attention
        names = attention.values() if isinstance(attention, dict) else [attention]
        if self.context_parallel.size > 1 and "context_parallel" not in names:
            raise ValueError(
                f"model.attention={attention!r} does not split the sequence, and context_parallel.size="
                f"{self.context_parallel.size} asks for it: take 'context_parallel', or size=1."
            )
        if self.distributed is not None:
            self._check_sizes()

    def _check_sizes(self) -> None:
        size = self.context_parallel.size
        data = self._parallel_size("fsdp_size") * self._parallel_size("dp_replicate_size")
        if data % size:
            raise ValueError(
                f"context_parallel.size={size} does not divide the {data} data ranks of 'distributed' (fsdp_size * "
                f"dp_replicate_size), along which CP groups lie: take fsdp_size={size} or a multiple of it, and start "
                f"tp_size * fsdp_size * dp_replicate_size processes."
            )
        if self.context_parallel.sequence_parallel and self.tensor_ranks == 1:
            raise ValueError(
                "context_parallel.sequence_parallel=true shards activations over the ranks of tensor parallelism, and "
                "distributed.tp_size is 1: take 2 or more, or leave it off."
            )
        if self.training.fsdp:
            raise ValueError(
                "training.fsdp and 'distributed' both shard the model: leave training.fsdp out, and let "
                "distributed.fsdp_size say it."
            )

    @property
    def processes(self) -> int:
        """The processes that it runs on, or a multiple of them where 'distributed' does not say how many exactly."""
        if self.distributed is None:
            return self.context_parallel.size
        return prod(map(self._parallel_size, PARALLEL_SIZES))

    @property
    def tensor_ranks(self) -> int:
        """The ranks that share each layer."""
        return self._parallel_size("tp_size")

    def _parallel_size(self, name: str) -> int:
        return getattr(self.distributed, name, None) or 1

    def distributed_config(self) -> DistributedConfig | None:
        """The `DistributedConfig`, or None where Transformers is not to shard the model.

        Raises:
            RecipeError: if DistributedConfig refuses a value.
        """
        if self.distributed is None:
            return None
        try:
            return DistributedConfig(**self.distributed.model_dump(exclude_unset=True))
        except ValueError as error:
            raise RecipeError(f"distributed: {error}") from error

    def training_arguments(self) -> TrainingArguments:
        """The `TrainingArguments`. Building them starts the process group of a launched run.

        Raises:
            RecipeError: if TrainingArguments refuses a value.
        """
        try:
            return TrainingArguments(**self.training.model_dump(exclude_unset=True))
        except (ValueError, ImportError) as error:
            raise RecipeError(f"training: {error}") from error

    def lora_config(self) -> LoraConfig | None:
        """The `LoraConfig`, or None for a full fine-tune.

        Raises:
            RecipeError: if LoraConfig refuses a value.
        """
        if self.lora is None:
            return None
        try:
            return LoraConfig(**{"task_type": "CAUSAL_LM", **self.lora.model_dump(exclude_unset=True)})
        except ValueError as error:
            raise RecipeError(f"lora: {error}") from error
