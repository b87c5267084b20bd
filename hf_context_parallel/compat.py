"""Undocumented names of PyTorch, Transformers, accelerate and PEFT, and differences between their versions.

No name that has to exist is looked up on import. If a version lacks a name, only what needs it is refused: a model
type, a compiled model, or the Trainer.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION_NAME = "_attn_implementation_internal"
"""Attribute of a configuration that holds the name of its attention."""


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """List the configurations of the layers of a model, or its own alone where all layers have the same.

    Transformers refuses to read a field of the model's configuration that differs between layers.
    """
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def widest_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the layer with the widest queries: heads times dimensions of a head."""

    def width(layer: PreTrainedConfig) -> int:
        return (getattr(layer, "num_attention_heads", None) or 1) * (getattr(layer, "head_dim", None) or 1)

    return max(layer_configs(config), key=width)


def lookup(module: str, name: str, needed_by: str) -> Any:
    """Look up an undocumented name of another package.

    Args:
        module: path of the module.
        name: the name in this module.
        needed_by: subject of the message, such as a model type that cannot run without it.

    Raises:
        ValueError: if the installed version does not have it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _missing(f"{name} in {module}", module.split(".")[0], needed_by) from error


def require(members: Mapping[type, Iterable[str]], needed_by: str) -> None:
    """Refuse classes of other packages that lack undocumented members.

    A method that our subclass overrides would otherwise never be called, in silence.

    Args:
        members: the names of the members, by class.
        needed_by: subject of the message.

    Raises:
        ValueError: naming the first member that is missing.
    """
    for kind, names in members.items():
        for name in names:
            if not hasattr(kind, name):
                raise _missing(f"{kind.__name__}.{name}", kind.__module__.split(".")[0], needed_by)


def _missing(what: str, package: str, needed_by: str) -> ValueError:
    return ValueError(
        f"{package} {version(package)} has no {what}, and {needed_by} needs it. Install a version of {package} that "
        "constraints.txt names, or an older one."
    )


set_compiler: Callable = getattr(torch._C._dynamo.eval_frame, "set_eval_frame", lambda callback: None)
"""Function by which `torch.compile` sets what compiles the frames that this thread enters. It returns what was set.

`torch.compiler.disable` sets None for all that a function calls, and has no way to compile some of it.
"""


def _of_torch(name: str) -> Any:
    return lookup("torch._C", name, "gradient checkpointing or a compiled model")


def _of_trees(name: str) -> Any:
    return lookup("torch.utils._pytree", name, "a model whose layers take or return nested tensors")


def tree_map(function: Callable, tree: Any) -> Any:
    """Apply a function to all leaves of nested containers."""
    return _of_trees("tree_map")(function, tree)


def tree_leaves(tree: Any) -> list:
    """List the leaves of nested containers."""
    leaves: list = _of_trees("tree_leaves")(tree)
    return leaves


def tree_flatten(tree: Any) -> tuple[list, Any]:
    """Split nested containers into their leaves and their form."""
    leaves, form = _of_trees("tree_flatten")(tree)
    return leaves, form


def tree_unflatten(leaves: Iterable, form: Any) -> Any:
    """Join leaves to nested containers of a form."""
    return _of_trees("tree_unflatten")(leaves, form)


@functools.cache
def _dispatch_of_a_new_thread() -> tuple[Any, Any]:
    """Return what PyTorch does beside each operation where no block and no operator has changed it."""
    sets = [_of_torch(f"_dispatch_tls_local_{name}_set") for name in ("include", "exclude")]
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: (sets[0](), sets[1]())).result()


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Let autograd record in this block. It does not record inside of an operator unless it is told to.

    What it saves is kept as it is: hooks around the operator, such as those of checkpointing, count what the operator
    itself saves.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with _of_torch("_ForceDispatchKeyGuard")(*_dispatch_of_a_new_thread()), torch.enable_grad(), hooks:
        yield


def is_in_backward() -> bool:
    """Return whether this thread is in a backward pass."""
    return bool(_of_torch("_current_graph_task_id")() != -1)


def has_ended(schedule: Any) -> bool:
    """Return whether accelerate steps a learning-rate schedule no further: one of a fixed length behind its end."""
    return hasattr(schedule, "total_steps") and schedule._step_count > schedule.total_steps


def causal_lm_classes() -> dict[str, str]:
    """Return the class names that `AutoModelForCausalLM` chooses from, by model type."""
    return lookup("transformers.models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "every model type")


def masked_lm_classes() -> dict[str, str]:
    """Return the class names that `AutoModelForMaskedLM` chooses from, by model type."""
    return lookup("transformers.models.auto.modeling_auto", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "every model type")


def image_text_classes() -> dict[str, str]:
    """Return the class names that `AutoModelForImageTextToText` chooses from, by model type."""
    name, needed_by = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "every multimodal model"
    return lookup("transformers.models.auto.modeling_auto", name, needed_by)


def multimodal_classes() -> dict[str, str]:
    """Return the class names that the auto classes of multimodal language models choose from, by model type."""
    name, needed_by = "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "every multimodal model"
    return {**lookup("transformers.models.auto.modeling_auto", name, needed_by), **image_text_classes()}


def processor_classes(config: PreTrainedConfig) -> tuple[type, type]:
    """Return the classes of the processor of a model type, and of the processor of images that uses Pillow."""
    processors = lookup("transformers.models.auto.processing_auto", "PROCESSOR_MAPPING", "a processor without files")
    return processors[type(config)], pillow_processor(config)


def pillow_processor(config: PreTrainedConfig) -> type:
    """Return the class of the processor of images of a model type that uses Pillow.

    A type without one of its own has that of a type with the same processor, and a thinker that of its model.

    Raises:
        KeyError: if there is none.
    """
    module, needed_by = "transformers.models.auto.image_processing_auto", "a processor without files"
    by_type = lookup(module, "IMAGE_PROCESSOR_MAPPING_NAMES", needed_by)
    processors = lookup("transformers.models.auto.processing_auto", "PROCESSOR_MAPPING_NAMES", needed_by)
    name = config.model_type.removesuffix("_thinker")
    if name not in by_type and name in processors:
        name = next((other for other in by_type if processors.get(other) == processors[name]), name)
    found: type = lookup(module, "get_image_processor_class_from_name", needed_by)(by_type[name]["pil"])
    return found


@functools.cache
def language_model_classes() -> frozenset[str]:
    """Return the class names that the auto classes of causal, masked and multimodal language models choose from."""
    return frozenset((*causal_lm_classes().values(), *masked_lm_classes().values(), *multimodal_classes().values()))


@functools.cache
def base_class_names() -> frozenset[str]:
    """Return the class names that `AutoModel` chooses from."""
    by_type = lookup("transformers.models.auto.modeling_auto", "MODEL_MAPPING_NAMES", "every model type")
    several = ((names,) if isinstance(names, str) else names for names in by_type.values())
    return frozenset(name for names in several for name in names)


def causal_lm_loss() -> Callable:
    """Return the default loss function of causal language models."""
    return lookup("transformers.loss.loss_utils", "ForCausalLMLoss", "the loss of every model type")


def mask_piece(name: str) -> Callable:
    """Return one of the functions from which Transformers builds masks."""
    return lookup("transformers.masking_utils", name, "a model type that sees whole sequences")


def find_no_documents_if(condition: Callable[[], bool]) -> None:
    """Let Transformers find no packed documents in positions where a condition holds, but when it compiles.

    A version without this function looks for none.
    """
    module, name = importlib.import_module("transformers.masking_utils"), "find_packed_sequence_indices"
    original = getattr(module, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def find(position_ids: torch.Tensor) -> torch.Tensor | None:
        if not torch.compiler.is_compiling() and condition():
            return None
        found: torch.Tensor | None = original(position_ids)
        return found

    setattr(module, name, find)


def chunks_count_from_documents() -> bool:
    """Return whether chunked attention counts chunks from the start of each packed document, as from 5.18 on."""
    return hasattr(importlib.import_module("transformers.masking_utils"), "remap_positions_for_packed_sequence")


def bloom_alibi() -> Callable:
    """Return the function that makes the score biases of Bloom from a padding mask."""
    return lookup("transformers.models.bloom.modeling_bloom", "build_alibi_tensor", "model type 'bloom'")


def attention_name(config: PreTrainedConfig) -> str | None:
    """Return the value of `attn_implementation` of a configuration."""
    return getattr(config, "_attn_implementation", None)


def set_attention_name(config: PreTrainedConfig, name: str) -> None:
    """Set the `attn_implementation` of a configuration, and not of the configurations inside it.

    Raises:
        ValueError: if the installed version of Transformers keeps the name elsewhere.
    """
    if not hasattr(config, ATTENTION_NAME):
        raise _missing(f"{type(config).__name__}.{ATTENTION_NAME}", "transformers", "every model type")
    setattr(config, ATTENTION_NAME, name)


def default_attention(model_class: type[PreTrainedModel]) -> str:
    """Return `"sdpa"` or `"eager"`: the default attention of Transformers for a model class."""
    require({PreTrainedModel: ["_supports_sdpa"]}, "every model type")
    return "sdpa" if model_class._supports_sdpa else "eager"


def mesh_of_loading(module: torch.nn.Module) -> DeviceMesh | None:
    """Return the mesh by which Transformers sharded this module while loading it, or None."""
    manager = getattr(module, "_mesh_manager", None)
    if manager is not None:
        return manager.get_mesh(("pp", "dp_replicate", "fsdp", "tp"))
    mesh = getattr(module, "_device_mesh", None)  # before 5.20
    return mesh if isinstance(mesh, DeviceMesh) else None


def tensor_parallel_size(model: PreTrainedModel) -> int:
    """Return the number of ranks that share each layer of a model, 1 without tensor parallelism."""
    return getattr(model, "_tp_size", None) or 1


def sums_after_accumulation(hook: Callable) -> bool:
    """Return whether a hook of a parameter is the one by which Transformers sums gradients of tensor parallelism."""
    return "ReplicatedWithGradAllReduce" in getattr(hook, "__qualname__", "")


def base_tuner() -> type | None:
    """Return the base class of the tuners of PEFT, or None if nothing has imported PEFT."""
    if sys.modules.get("peft") is None:
        return None
    return lookup("peft.tuners.tuners_utils", "BaseTuner", "the check of tuners")


def recorded_outputs() -> dict[str, Any]:
    """Return the lists to which a model that runs appends outputs of its modules, by the name of the output."""
    collector = lookup("transformers.utils.output_capturing", "_active_collector", "tile_tokens")
    return collector.get() or {}


def is_expert_parallel(module: torch.nn.Module) -> bool:
    """Return whether a module holds some of the experts, and other ranks hold the others."""
    return bool(getattr(module, "_is_expert_parallel", False))


def asks_interface(module_class: type[torch.nn.Module]) -> bool:
    """Return whether the forward of a module uses the attention interface. GPT-J and CodeGen do from 5.24 on."""
    forward = inspect.unwrap(module_class.forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def add_to_attention_tables(
    name: str, known: Callable[[type], bool], guard: Callable[[torch.nn.Module, str], None]
) -> None:
    """Add `name` to the tables from which some model types choose the class of their attention.

    Such a type does not use the attention interface. Its tables are filled when a model is made with `name`. That is
    done in the constructor that all models share, since Transformers has no hook before the layers are made.

    Args:
        name: the value of `attn_implementation`.
        known: returns whether the eager attention class of a table may be used for `name` too.
        guard: is called with each module that is made by any other table, and the name of the table. The module is of
            the class that Transformers takes by default.
    """
    original = PreTrainedModel.__init__

    @functools.wraps(original)
    def init(self, config, *args: Any, **kwargs: Any):
        if attention_name(config) == name:
            for module in {kind.__module__ for kind in type(self).__mro__}:
                _fill_tables(sys.modules[module], name, known, guard)
        original(self, config, *args, **kwargs)

    PreTrainedModel.__init__ = init


def _fill_tables(
    module: ModuleType,
    name: str,
    known: Callable[[type], bool],
    guard: Callable[[torch.nn.Module, str], None],
) -> None:
    for table_name, table in vars(module).items():
        if table_name.endswith("ATTENTION_CLASSES") and isinstance(table, MutableMapping) and "eager" in table:
            table.setdefault(name, table["eager"] if known(table["eager"]) else _guarded(table, table_name, guard))


def _guarded(table: Mapping[str, type], table_name: str, guard: Callable[[torch.nn.Module, str], None]) -> Callable:
    """Return a function that makes the default module of a table, and calls `guard` with it."""

    def make(*args: Any, **kwargs: Any) -> torch.nn.Module:
        module: torch.nn.Module = table["sdpa" if "sdpa" in table else "eager"](*args, **kwargs)
        guard(module, table_name)
        return module

    return make
