"""Registry of model types: their state (exact or refused), and the modules that need more than attention."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from ..compat import asks_interface

logger = logging.getLogger(__name__)

NAME = "context_parallel"
"""The value of `attn_implementation` that this package registers."""
TEXT_ALONE = {"": NAME, "text_config": NAME, "vision_config": "sdpa"}
"""The value of `attn_implementation` for a composite model whose text is sharded and whose vision tower is not."""

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
"""Class names of modules that mix tokens by other means than the attention interface."""

NO_INTERFACE = re.compile(r"(Bloom|CodeGen|Falcon|GPTNeoSelf|GPTNeoXJapanese|GPTJ|Mpt|XGLM)Attention")
"""Class names of attention modules that do not use the attention interface in all versions of Transformers."""

ATTENDS_TO_LAYERS = re.compile(r"Inkling2(Loop)?(Block|Message)AttentionResidual")
"""Class names of modules in which each token attends to earlier layers instead of other tokens.

They call the attention interface with the outputs of earlier layers as keys.
"""

SHORT_CONVOLUTIONS = re.compile(r"\w+ShortConv")
"""Class names of convolutions without a state that are the only mixer of their layer."""

MAKES_POSITIONS = re.compile(
    r"OPTLearnedPositionalEmbedding"
    r"|(Camembert|Data2VecText|Esm|Roberta|RobertaPreLayerNorm|XLMRoberta|XLMRobertaXL|Xmod)\w*Embeddings"
)
"""Class names of modules that count positions themselves, from the first token or the first one after padding."""

WHOLE_MODELS = {
    "bart",
    "big_bird",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "blt",
    "cpmant",
    "glm5_next_text",
    "glm_moe_dsa",
    "hy_v4",
    "hy_v4_vl_text",
    "marian",
    "mbart",
    "megatron-bert",
    "mistral_large4_text",
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
"""Model types that are computed on whole sequences altogether.

Their code between modules mixes tokens or makes positions.
"""

DEPENDS_ON_ATTN_NAME = {
    "axk2",
    "deepseek_v32",
    "dots3_note",
    "dots3_note_text",
    "falcon",
    "glm_moe_dsa",
    "hy_v4",
    "hy_v4_vl_text",
    "minimax_m3_vl_text",
    "mistral_large4_text",
}
"""Model types whose layers compute something else if the name of their attention is not one of Transformers."""

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
"""Model types whose loss compares the logits of a token with the label of that token, and not of the next one."""

_NOT_BUILT = "AutoModelForCausalLM cannot build it from its configuration, so that it was not tested"
_DRAFTS = "it drafts for another model, whose keys and values it takes, and cannot be trained alone"
REFUSED = {
    "gemma3n": "its vision tower needs the timm package, so that it was not tested; its text, gemma3n_text, is exact",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "git": "it needs images, and image tokens come before the text and belong to no shard",
    "musicgen": _NOT_BUILT,
    "musicgen_melody": _NOT_BUILT,
    "prophetnet": "it predicts several tokens at a time, and its loss is not a sum over a shard's tokens",
}
"""Model types that are not exact on shards, each with the reason."""

REFUSED_SETTINGS = {
    ("doge", "is_moe", True): "its experts are chosen by logits of other tokens of the batch",
}
"""Type, field of its configuration and value of this field that are refused, and why."""

KNOWN = Path(__file__).parent.parent / "models.json"
"""File with the result of every model type, which `hf-context-parallel check --all --write` makes."""

KNOWN_MULTIMODAL = KNOWN.with_name("multimodal.json")
"""File with the result of every type that takes media, which `hf-context-parallel check --all --vlm --write` makes."""

NOT_TESTED = "so that it was not tested"
"""End of the reason of a type that could not be built."""

NOT_MADE = "no tiny model of this type can be made"
"""Beginning of the reason of a type that could not be checked."""

KNOWN_TENSOR_PARALLEL = KNOWN.with_name("tensor_parallel.json")
"""File with the result of every model type that has a tensor-parallel plan.

`hf-context-parallel check --all --tp 2 --write` makes it.
"""

CHECKED_AS = {"emu3_text_model": "emu3", "mllama_text_model": "mllama"}
"""Model types of text configurations, each with the type of the causal language model that was checked."""


@cache
def is_called(kind: type, pattern: re.Pattern) -> bool:
    """Return whether the name of a class, or of one of its bases, matches. FSDP2 derives a class for each module."""
    return any(pattern.fullmatch(parent.__name__) for parent in kind.__mro__)


def sees_whole(kind: type[torch.nn.Module]) -> bool:
    """Return whether a class of modules mixes tokens by other means than the attention interface."""
    return is_called(kind, SEES_WHOLE) or (is_called(kind, NO_INTERFACE) and not asks_interface(kind))


def attends_to_layers(module: torch.nn.Module) -> bool:
    """Return whether a module calls the attention interface without mixing tokens."""
    return is_called(type(module), ATTENDS_TO_LAYERS)


@cache
def known_states() -> dict[str, dict]:
    """Read the results of all causal and masked language models that were checked, by type."""
    if not KNOWN.exists():
        return {}
    content = json.loads(KNOWN.read_text())
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    if rank == 0 and not is_table_of_installed(content):
        logger.warning(
            f"Model types were compared with one process in Transformers {content['transformers']}, and "
            f"{transformers.__version__} is installed. Run `hf-context-parallel check TYPE` to compare yours."
        )
    return content["types"]


@cache
def known_multimodal() -> dict[str, dict]:
    """Read the results of all types that take media, by type."""
    return json.loads(KNOWN_MULTIMODAL.read_text())["types"] if KNOWN_MULTIMODAL.exists() else {}


@cache
def known_decoders() -> dict[str, dict]:
    """Read the results of all types whose decoders may be sharded, by type. A type of both tables has that of text."""
    return {**known_multimodal(), **known_states()}


def is_decided(name: str) -> bool:
    """Return whether the tables say of a type that it is exact, or that it is not."""
    found = known_decoders().get(name)
    reason = "" if found is None else found.get("reason", "")
    return found is not None and not reason.startswith(NOT_MADE) and not reason.endswith(NOT_TESTED)


def is_table_of_installed(content: dict) -> bool:
    """Compare the minor version of Transformers that a table of results names with the installed one."""
    return Version(content["transformers"]).release[:2] == Version(transformers.__version__).release[:2]


@cache
def known_tensor_parallel() -> dict[str, dict]:
    """Read the results of all model types that were checked with tensor parallelism, by type."""
    return json.loads(KNOWN_TENSOR_PARALLEL.read_text())["types"] if KNOWN_TENSOR_PARALLEL.exists() else {}


LEARNED_POSITIONS = re.compile(r"(.*\.)?(wpe|embed_positions|position_embeddings?)")
"""Names of the modules that hold learned position embeddings."""


def learned_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions that a model has learned embeddings of, or None."""
    # A vision tower inside the decoder has learned positions too, but fewer of them.
    least = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    for name, module in decoder_of(model).named_modules():
        is_of_positions = isinstance(module, torch.nn.Embedding) and LEARNED_POSITIONS.fullmatch(name)
        if is_of_positions and module.num_embeddings >= least:
            before_first = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - before_first
    return None


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that holds all layers that mix tokens: the text decoder, or the encoder of an encoder."""
    decoder = model.get_decoder()
    # That of ModernBERT and of its kin is a layer of the head.
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return decoder
    if model.base_model is not model:
        return model.base_model
    # The prefix of a few classes names no module of theirs.
    embeddings = model.get_input_embeddings()
    inside = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return next((decoder_of(child) for child in inside if child.get_input_embeddings() is embeddings), model)


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the first of the outermost Transformers models inside a wrapper such as DDP.

    Raises:
        ValueError: if there is none.
    """
    return outermost_models(model)[0]


def outermost_models(model: torch.nn.Module) -> list[PreTrainedModel]:
    """List the Transformers models of a module that lie in no other one.

    Raises:
        ValueError: if there is none.
    """
    found = list(models_inside(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no Transformers model, and no other model can be sharded. Pass a "
            "Transformers model, or call cp.attention in your own model."
        )
    return found


def models_inside(model: torch.nn.Module) -> Iterator[PreTrainedModel]:
    """Iterate over the Transformers models of a module that lie in no other one, which may be the module itself."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from models_inside(child)
