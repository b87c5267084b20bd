"""Which models are exact on shards, and what their modules need for it."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import asks_interface, attention_name, base_class_names, causal_lm_classes, causal_lm_loss
from .replacement import own_forward
from .seams import CONVOLUTION, SCANS, seams
from .tuners import check_tuners

logger = logging.getLogger(__name__)


NAME = "context_parallel"
"""The value of `attn_implementation` that this package registers."""
TEXT_ALONE = {"": NAME, "text_config": NAME, "vision_config": "sdpa"}
"""The value for a composite model whose text is sharded and whose vision tower is not."""

SEES_WHOLE = re.compile(
    # state space, linear attention, recurrences
    r"(Bamba|FalconH1|FalconMamba|JambaMamba|Mamba|Mamba2|NemotronHMamba2|ZambaMamba|Zamba2Mamba)Mixer"
    r"|GraniteMoeHybridMambaLayer|(BailingHybrid|KimiLinear)DeltaAttention|MiniMaxLightningAttention"
    r"|\w+GatedDeltaNet|RecurrentGemmaRecurrentBlock|Rwkv(SelfAttention|FeedForward)|xLSTMLayer"
    r"|Qwen4ExpText(NGramEmbedding|PLELayer|Attention)"
    # short convolutions
    r"|\w+ShortConv(olution)?|ZayaAttention"
    # attention that picks its keys, or biases their scores
    r"|(AXK2|DeepseekV32|DeepseekV4|Dots3NoteText|GlmMoeDsa|HYV4|MiniMaxM3VL\w*|Doge|Inkling|Inkling2\w*)Attention"
)
"""The modules that mix tokens otherwise than by the attention interface, by their classes' names."""

NO_INTERFACE = re.compile(r"(Bloom|CodeGen|Falcon|GPTNeoSelf|GPTNeoXJapanese|GPTJ|Mpt|XGLM)Attention")
"""The attentions that no interface reaches in some version of Transformers or in all, by their classes' names."""

ATTENDS_TO_LAYERS = re.compile(r"Inkling2(Loop)?(Block|Message)AttentionResidual")
"""The modules that ask the attention interface for each token by itself, with earlier layers in the place of keys."""

SHORT_CONVOLUTIONS = re.compile(r"\w+ShortConv")
"""Those of them that carry no state along the sequence, and no other module of their layer sees whole sequences."""

MAKES_POSITIONS = re.compile(
    r"OPTLearnedPositionalEmbedding"
    r"|(Camembert|Data2VecText|Roberta|RobertaPreLayerNorm|XLMRoberta|XLMRobertaXL|Xmod)\w*Embeddings"
)
"""The modules that count positions from the first token, or the first that is not padding, that they see."""

WHOLE_MODELS = {
    "bart",
    "big_bird",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "blt",
    "cpmant",
    "glm_moe_dsa",
    "hy_v4",
    "marian",
    "mbart",
    "megatron-bert",
    "mvp",
    "openai-gpt",
    "pegasus",
    "plbart",
    "prophetnet",
    "reformer",
    "rembert",
    "roformer",
    "trocr",
    "xlm",
    "xlnet",
}
"""The types whose whole model sees whole sequences: it mixes tokens or makes positions between its modules."""

ASK_FOR_THE_NAME = {
    "axk2",
    "deepseek_v32",
    "dots3_note",
    "dots3_note_text",
    "falcon",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl_text",
}
"""The types whose layers compute something else where their attention is not called by one of Transformers' names."""

UNSHIFTED = {
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "cpmant",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "trocr",
    "whisper",
    "xlm",
    "xlnet",
}
"""The types whose loss compares each token's logits with its own label and not with the next one's."""

_NOT_BUILT = "AutoModelForCausalLM cannot build it from its configuration, so that it was not tested"
_DRAFTS = "it drafts for another model, whose keys and values it takes, and cannot be trained alone"
REFUSED = {
    "gemma3n": "its vision tower needs the timm package, so that it was not tested; its text, gemma3n_text, is exact",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "git": "it needs images, whose tokens come before the text's and are in no shard",
    "musicgen": _NOT_BUILT,
    "musicgen_melody": _NOT_BUILT,
    "prophetnet": "it predicts several tokens at a time, and its loss is not a sum over a shard's tokens",
}
"""The types that are not exact on shards, and why."""

KNOWN = Path(__file__).parent.parent / "models.json"
"""What `hf-context-parallel check --all --write` has found of each type."""

KNOWN_TENSOR_PARALLEL = KNOWN.with_name("tensor_parallel.json")
"""What `hf-context-parallel check --all --tp 2 --write` has found of each type that has a tensor-parallel plan."""

_CHECKED_AS = {"emu3_text_model": "emu3", "mllama_text_model": "mllama"}
"""Types of the configurations that causal language models of other types have."""

_trying = False


@cache
def known_states() -> dict[str, dict]:
    """For each model type that was checked, what was found."""
    if not KNOWN.exists():
        return {}
    content = json.loads(KNOWN.read_text())
    if Version(content["transformers"]).release[:2] != Version(transformers.__version__).release[:2]:
        logger.warning(
            f"Models were compared with one process in Transformers {content['transformers']}, and "
            f"{transformers.__version__} is installed. `hf-context-parallel check TYPE` compares one with that."
        )
    return content["types"]


@cache
def known_tensor_parallel() -> dict[str, dict]:
    """For each model type that was checked with tensor parallelism, what was found."""
    return json.loads(KNOWN_TENSOR_PARALLEL.read_text())["types"] if KNOWN_TENSOR_PARALLEL.exists() else {}


@contextmanager
def trying() -> Iterator[None]:
    """Run types that are not known to be exact: to find out."""
    global _trying
    before, _trying = _trying, True
    try:
        yield
    finally:
        _trying = before


@cache
def _is_called(kind: type, pattern: re.Pattern) -> bool:
    """Whether a class, or one that it is derived from, has such a name: FSDP2 derives classes of its own."""
    return any(pattern.fullmatch(parent.__name__) for parent in kind.__mro__)


def sees_whole(kind: type[torch.nn.Module]) -> bool:
    """Whether a class of modules mixes tokens otherwise than by the attention interface."""
    return _is_called(kind, SEES_WHOLE) or (_is_called(kind, NO_INTERFACE) and not asks_interface(kind))


def attends_to_layers(module: torch.nn.Module) -> bool:
    """Whether what a module asks the attention interface for mixes no tokens."""
    return _is_called(type(module), ATTENDS_TO_LAYERS)


def is_native(module: torch.nn.Module) -> bool:
    """Whether a mixer mixes tokens by functions that it is known how to share, and by nothing else.

    Of such a one each rank computes its share; the others have to see whole sequences.
    """
    called = seams(module)
    # Where a state is carried along, the function that does it must be one of them, too.
    return CONVOLUTION in called and (bool(called & SCANS.keys()) or _is_called(type(module), SHORT_CONVOLUTIONS))


def mixers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that mix tokens otherwise than by the attention interface, none of them inside another."""
    if isinstance(model, PreTrainedModel) and model.config.model_type in WHOLE_MODELS:
        decoder = model.get_decoder()
        return [model.base_model if decoder is model else decoder]
    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        kind = type(module)
        if module not in inside and (sees_whole(kind) or _is_called(kind, MAKES_POSITIONS)):
            found.append(module)
            inside.update(module.modules())
    return found


def check_tensor_parallel_type(name: str, sequence_parallel: bool) -> None:
    """Refuse a model type that has not been found exact with tensor parallelism.

    Raises:
        ValueError: with what was found of it.
    """
    name = _CHECKED_AS.get(name, name)
    found = known_tensor_parallel().get(name, {})
    if _trying or found.get("sequence_parallel" if sequence_parallel else "state") == "exact":
        return
    what = "sequence_parallel=True" if found.get("state") == "exact" else "tensor parallelism (tp_size > 1)"
    reason = found.get("reason") or "it has not been found to be that of one process"
    raise ValueError(
        f"model type {name!r} is refused with {what}: {reason}. "
        f"`hf-context-parallel check {name} --tp 2` compares it. "
        f"{'Leave sequence_parallel off' if found.get('state') == 'exact' else 'Load it with tp_size=1'}."
    )


def styles_of(model: PreTrainedModel) -> dict[torch.nn.Module, str]:
    """The modules that the model's tensor-parallel plan names, or of which it names a parameter, each with its style.

    Of these, the style of a parameter is what counts.
    """
    plan, styles = dict(model.tp_plan or {}), {}
    for name, module in model.named_modules():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        named = [generic, *(f"{generic}.{parameter}" for parameter, _ in module.named_parameters(recurse=False))]
        for entry in named:
            if entry in plan:
                styles[module] = plan[entry]
    return styles


def makes_positions(module: torch.nn.Module) -> bool:
    """Whether a module, or a whole model, makes positions of its own unless it is given some."""
    return isinstance(module, PreTrainedModel) or _is_called(type(module), MAKES_POSITIONS)


LEARNED_POSITIONS = re.compile(r"(.*\.)?(wpe|embed_positions|position_embeddings?)")
"""What models call the embedding of positions that they have learned."""


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has learned embeddings of; None if it has none."""
    # A vision tower inside of the decoder has positions of its own, and fewer.
    least = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    for name, module in model.get_decoder().named_modules():
        is_of_positions = isinstance(module, torch.nn.Embedding) and LEARNED_POSITIONS.fullmatch(name)
        if is_of_positions and module.num_embeddings >= least:
            before_first = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - before_first
    return None


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """The outermost Transformers model within what wraps it.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(
        f"{type(model).__name__} holds no Transformers model, and only those can be sharded. Pass one, or call "
        "cp.attention in a model of your own."
    )


def check_model(model: torch.nn.Module) -> None:
    """Refuse a model that would not be exact.

    Args:
        model: as the caller has it: wrapped by DDP, FSDP, PEFT or not at all.

    Raises:
        ValueError: naming the type or setting, and what to do.
    """
    module = transformers_model(model)
    config, name = module.config, type(module).__name__
    check_config(config)
    stock = _stock_class(module)
    if stock is None or not _has_forward_of(stock, module):
        raise ValueError(
            f"{name} is not one of Transformers' causal language models, or has a forward of its own, as fused losses "
            "(liger, unsloth) give it: what it does with outputs, it would do with a shard's. Exact are the classes "
            "that AutoModelForCausalLM and AutoModel choose, as they are."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder and a decoder, which are given different sequences; the decoder alone is exact, "
            "as AutoModelForCausalLM loads it."
        )
    if stock.__name__ in causal_lm_classes().values() and module.loss_function is not causal_lm_loss():
        raise ValueError(
            f"{name} has a loss function of its own, {module.loss_function!r}, and it is not known whether that takes "
            "shift_labels and num_items_in_batch. Leave loss_function alone, or call the model without labels and "
            "compute the loss from cp.gather(logits)."
        )
    check_tuners(model)
    if model.training:
        _refuse_layer_drop(config)
    attention = attention_name(config.get_text_config())
    if attention != NAME:
        raise ValueError(
            f"{name} was loaded with attn_implementation={attention!r}; load it with attn_implementation={NAME!r}, or "
            f"call model.set_attn_implementation({NAME!r})."
        )


def _stock_class(model: PreTrainedModel) -> type | None:
    """The class that `AutoModelForCausalLM` or `AutoModel` chooses, of which the model is one, if it is."""
    names = base_class_names().union(causal_lm_classes().values())
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.") and kind.__name__ in names:
            return kind
    return None


def _has_forward_of(stock: type, model: PreTrainedModel) -> bool:
    """Whether a model computes what Transformers wrote: neither its class, nor it itself, nor the stock class has
    another forward. Wrappers that say what they wrap, as accelerate's do, are looked through."""
    original = inspect.unwrap(stock.forward)
    if type(model).forward is not stock.forward or not original.__module__.startswith("transformers."):
        return False
    own = inspect.unwrap(own_forward(model))
    return getattr(own, "__func__", own) is original


def _refuse_layer_drop(config: PreTrainedConfig) -> None:
    """Ranks draw on their own, and would skip different layers: those that do not would wait for those that do."""
    for name in ("layerdrop", "decoder_layerdrop", "encoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"{type(config).__name__} asks for {name}={getattr(config, name)}, which skips layers at random, on "
                f"each rank others. Set {name}=0.0."
            )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a configuration that would not be exact. See `check_model`."""
    name = _CHECKED_AS.get(config.model_type, config.model_type)
    if name in REFUSED:
        raise ValueError(f"model type {name!r} is refused: {REFUSED[name]}. Call the model outside cp.shard.")
    if not _trying and known_states().get(name, {}).get("state") not in ("exact", "exact by resharding"):
        reason = known_states().get(name, {}).get("reason") or "it has not been compared with one process"
        raise ValueError(
            f"model type {name!r} is refused: {reason}. `hf-context-parallel check {name}` compares it. If this is "
            f"one part of a composite model, give each part its own attention, as attn_implementation={TEXT_ALONE}."
        )
