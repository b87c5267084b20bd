"""Which models are exact on shards, and what their modules need for it."""

from __future__ import annotations

import json
import logging
import re
from functools import cache
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from ..compat import asks_interface

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

DEPENDS_ON_ATTN_NAME = {
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

CHECKED_AS = {"emu3_text_model": "emu3", "mllama_text_model": "mllama"}
"""Types of the configurations that causal language models of other types have."""


@cache
def is_called(kind: type, pattern: re.Pattern) -> bool:
    """Whether a class, or one that it is derived from, has such a name: FSDP2 derives classes of its own."""
    return any(pattern.fullmatch(parent.__name__) for parent in kind.__mro__)


def sees_whole(kind: type[torch.nn.Module]) -> bool:
    """Whether a class of modules mixes tokens otherwise than by the attention interface."""
    return is_called(kind, SEES_WHOLE) or (is_called(kind, NO_INTERFACE) and not asks_interface(kind))


def attends_to_layers(module: torch.nn.Module) -> bool:
    """Whether what a module asks the attention interface for mixes no tokens."""
    return is_called(type(module), ATTENDS_TO_LAYERS)


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
