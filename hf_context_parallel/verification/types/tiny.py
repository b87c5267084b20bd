"""Tiny models of all language model types, with random weights that are the same in every process.

A configuration is shrunk by the field names that configurations share. Widths, heads, ranks, experts, windows and so
on become small. Few layers are kept, but at least one of each kind. Everything else (activations, norms, biases, kind
of RoPE, tied weights) stays unchanged. Types whose fields depend on each other in other ways are listed in `_OWN`.
"""

from __future__ import annotations

import copy
import importlib
import re
from math import lcm
from typing import Any, NamedTuple

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 64
TEXT = 48
"""Ids from here on mark the places of images, video and sound, and what surrounds them."""
_POSITIONS = 256
_LAYERS = 4


def _by_name(names_of: dict[int, str]) -> dict[str, int]:
    """Map each name to the number that it is listed under."""
    return {name: number for number, names in names_of.items() for name in names.split()}


# Largest values of the fields with these names. Smaller values and None stay.
_AT_MOST = _by_name(
    {
        _POSITIONS: """
            max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions context_length
        """,
        64: """
            original_max_position_embeddings encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size
            num_centroids ngram_vocab_size_base num_position_embeddings position_embedding_size pos_emb_height
            pos_emb_width codebook_size num_embeddings mm_posemb_size alignment_intermediate_size
        """,
        32: """
            max_source_positions output_channels ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels
            base_channels num_pos_feats downsample_hidden_size
        """,
        16: """
            q_lora_rank kv_lora_rank o_lora_rank index_head_dim chunk_size mamba_chunk_size floor_scale
            log_scaling_n_floor query_pre_attn_scalar rel_extent router_hidden_size hidden_size_per_layer_input
            pronunciation_embed_dim shape_embed_dim attention_head_dim indexer_head_dim num_patches
            num_conv_pos_embeddings
        """,
        8: """
            qk_nope_head_dim v_head_dim d_kv d_head dim_head linear_key_head_dim linear_value_head_dim linear_head_dim
            attention_chunk_size block_size index_topk laurel_rank mamba_d_head mamba_head_dim mamba_d_state state_size
            ssm_state_size attention_head_size d_rel adapter_rank hc_lowrank index_block_size indexer_budget
            index_n_heads indexer_n_heads make_ngram_vocab_size_divisible_by kv_channels mamba_headdim
        """,
        7: """
            sliding_window sliding_window_size attention_window_size window_size local_attention
            local_attention_window_len keep_window_size
        """,
        4: """
            qk_rope_head_dim zero_expert_num time_step_rank mamba_dt_rank rotary_dim split_ngram_parts
        """,
        2: """
            n_group num_expert_group num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts
            n_groups mamba_n_groups mamba_ngroups o_groups index_topk_blocks num_random_blocks heads_per_ngram
        """,
        1: """
            topk_group first_k_dense_replace num_dense_layers moe_layer_start_index n_shared_experts num_shared_experts
            moe_num_shared_experts num_nextn_predict_layers
        """,
    }
)
# These fields become the number of the tokenizer's ids, whatever the value was.
_VOCABULARIES = ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")
_EXPERTS = _by_name({4: "num_experts n_routed_experts num_local_experts moe_num_experts"})
# Largest values of fields that tensor-parallel ranks share, for up to two ranks. They grow with the number of ranks,
# so that heads keep their width.
_SHARED_AT_MOST = _by_name(
    {
        64: "mamba_d_ssm",
        48: """
            intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff ffn_hidden_size d_inner d_ff
            intermediate_size_mlp dense_intermediate_size feed_forward_size mlp_dim
        """,
        16: """
            moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
            shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
        """,
        8: "mamba_n_heads mamba_num_heads n_mamba_heads",
        2: "linear_num_key_heads",
    }
)
# The same for key/value heads. If there are several, there is at least one for each rank.
_KEY_VALUE_HEADS = _by_name({2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"})
# These fields always get the value, even if it is larger, because other sizes are parts or multiples of them.
_SHARED = _by_name(
    {
        32: """
            hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim hidden_size_global
            input_embedding_size output_embedding_size lru_width input_size backbone_hidden_size adapter_in_dim
            adapter_out_dim adapter_input_size ple_embed_dim embed_dim out_hidden_size text_hidden_size
            output_dim mm_embed_dim output_proj_dims projector_hidden_size projection_hidden_dim
            projection_hidden_size projection_intermediate_size projection_dim projector_input_dim
            projector_output_dim encoder_hidden_size decoder_hidden_size merged_hidden_size
            vision_hidden_size audio_hidden_size image_text_hidden_size pooler_output_size
            patch_embed_hidden_size thinker_hidden_size latent_channels image_token_embed_dim hidden_dim
        """,
        4: """
            num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
            num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads
            num_attention_heads_per_layer linear_num_value_heads linear_num_heads
        """,
    }
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "depth",
)
# Fields that list the indices of the layers of one kind.
_INDICES = (
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "cross_attention_layers",
    "mlp_only_layers",
    "moe_layers",
    "local_layer_ids",
    "deepstack_visual_indexes",
    "fullatt_block_indexes",
    "global_attn_indexes",
    "intermediate_layers_indices",
)
# Names of the fields that hold ids of special tokens, and not indices of layers.
_SPECIAL = re.compile(r"(?!moe_layer_)\w*_(token|start|end|newline|patch|bos|eos|pad)_(id|ids|index)")
# Fields that a type needs in addition to the names above.
_OWN: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 12}, "max_value_projector_patch_to_query_dict": 12},
    "chameleon_vqgan": {"num_embeddings": 8, "channel_multiplier": [1] * 4, "resolution": 32},
    "emu3_vqgan": {"codebook_size": 8, "channel_multiplier": [1] * 4},
    "minicpm_ocr": {"insert_layer_id": 0},
    "minicpmv4_6": {"insert_layer_id": 0},
    "minicpmv4_7": {"insert_layer_id": 0},
    "mllama_vision_model": {"vision_output_dim": 64},
    "dots3_note_audio_encoder": {"conv_output_size": 512},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 32]},
    "gemma3": {"mm_tokens_per_image": 16},
    "dots3_note_vision_encoder": {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "per_layer_config": {1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma4_audio": {"subsampling_conv_channels": [32, 8]},  # the first is the number of bins too
    "glmasr_encoder": {"intermediate_size": 128},
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "glm5_next_text": {"index_kpool": 4},
    "granite4_vision": {
        "spatial_target_layers": [0, 1, 0, 1],
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "vision_config": {"hidden_size": 64},  # one head of its projector
    },
    "mistral4": {"qk_nope_head_dim": 4, "qk_head_dim": 8, "head_dim": 8},
    "llama4_vision_model": {"intermediate_size": 128, "vision_output_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [56, 56], "num_position_embeddings": 16},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "omniasr_audio": {"conv_dim": [16] * 7},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7, "hidden_size": 32, "vae_std": 0.0},
    "voxtral_encoder": {"intermediate_size": 128},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_hidden_layers": 4},
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "t5gemma2_encoder": {"mm_tokens_per_image": 16},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [16, 32]},
    "vipllava": {"vision_feature_layers": [-1, -2], "vision_feature_layer": [-1, -2]},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},  # of one stack; the model multiplies them
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 1,
    },
    "qwen4_exp_text": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "ple_layer_ids": [1],  # counted from one
        "number_of_conv_states": 3,
    },
    "recurrent_gemma": {"num_hidden_layers": 2, "block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},  # axial positions would allow one length only
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}
# Fields that the default configurations of some types lack.
_HALF_SLIDING = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7}
_HEAD = {"head_dim": 128}
_INDEXER = {
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
_PARTS: dict[str, Any] = {"vision_config": {}, "audio_config": {}}
_IMAGE_AND_VIDEO = {"image_token_id": 18, "video_token_id": 19}
_MARKS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}


def _with_axes(*sections: int, **others: Any) -> dict[str, Any]:
    """Return the fields of a model with three axes of positions, each with a number of frequencies."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return {"text_config": {"rope_parameters": rope, **others}}


UNSTATED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["glm46v", "glm4v", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"], _with_axes(16, 24, 24)),
    "blip-2": {"image_token_index": 18},
    "instructblip": {"image_token_index": 18},
    "instructblipvideo": {"video_token_index": 18},
    "chameleon": {
        "vocabulary_map": {"<image>": TEXT, **{f"IMGIMG{'ABCDEFGH'[code]}Z": 56 + code for code in range(8)}}
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": TEXT,
            "<|extra_200|>": 49,
            **{f"<|visual token {code:06}|>": 56 + code for code in range(8)},
        }
    },
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]}
            }
        }
    },
    "cosmos3_omni": _with_axes(24, 20, 20),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _IMAGE_AND_VIDEO),
    "voxtral": {"audio_token_id": 24},
    "voxtral_realtime": {"audio_token_id": 24},
    "nemotron_h_omni": {"image_token_id": 18, "video_token_id": 19, "audio_token_id": 20},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 2, "n_group": 1}
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    },
    "ernie4_5_vl_moe": _with_axes(22, 22, 20),
    "gemma4": {**_PARTS, "text_config": {"use_bidirectional_attention": "vision"}},
    "gemma4_unified": {**_PARTS, "text_config": {"use_bidirectional_attention": "vision"}},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "mrope_section": [5, 8, 8],
            }
        }
    },
    "glm_ocr": _with_axes(8, 12, 12),
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-1, 1]], "downsample_rate": "1/2"},
    "hunyuan_vl": _with_axes(16, 24, 24, head_dim=128),
    "qwen2_5_omni_thinker": {**_with_axes(16, 24, 24), **_MARKS},
    "qwen3_5": _with_axes(11, 11, 10, head_dim=256),
    "qwen3_omni_moe_thinker": {**_with_axes(24, 20, 20), **_MARKS},
    "qwen3_vl": _with_axes(24, 20, 20),
    "qwen3_vl_moe": _with_axes(24, 20, 20),
    "step3p7": {"text_config": {"sliding_window": 512}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 64, "mask_token_id": 4, "pad_token_id": 1},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "ministral": _HEAD,
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "xmod": {"default_language": "en_XX"},
}
"""Fields that a model needs and that the default configuration of its type lacks."""
# Fields for types whose default configuration does not have all kinds of layers that the type can have.
_KINDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots1": _HALF_SLIDING,
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "laguna": _HALF_SLIDING,
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "mellum": _HALF_SLIDING,
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "qwen2": {"use_sliding_window": True, **_HALF_SLIDING},
    "qwen2_moe": {"use_sliding_window": True, **_HALF_SLIDING},
    "qwen3": {"use_sliding_window": True, **_HALF_SLIDING},
    "smollm3": {"use_sliding_window": True, **_HALF_SLIDING, "no_rope_layers": [0, 1]},
    "zaya": {**_HALF_SLIDING, "layer_types": ["hybrid", "hybrid_sliding"]},
}


class _Limits(NamedTuple):
    """Smallest and largest values of the fields of a small configuration, by their names."""

    least: dict[str, int]
    most: dict[str, int]

    def applied(self, name: str, value: float) -> float:
        """Limit the value of a field."""
        small = min(value, self.most.get(name, value))
        return max(small, self.least.get(name, small))


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Make the configuration of a tiny model of this type, as `check` runs it; see `shrink`."""
    values = {**UNSTATED.get(model_type, {}), **_KINDS.get(model_type, {})}
    return shrink(AutoConfig.for_model(model_type, **values), **changes)


def shrink(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """Make a small configuration of the same architecture, without dropout. `changes` are fields to set afterwards."""
    fields = config.to_dict()
    small = _shrunk(fields, _limits(VOCABULARY, tensor_ranks=1, expert_ranks=1))
    small = _with_special_tokens(small, {})
    made = type(config).from_dict({**_without_randomness(small), **changes})
    made.name_or_path = config.name_or_path  # where code of its own comes from
    return made


def with_small_sizes(
    config: PreTrainedConfig, vocabulary: int, tensor_ranks: int, expert_ranks: int
) -> PreTrainedConfig:
    """Make a small configuration of the same architecture, with dropout and all other fields unchanged.

    Args:
        config: the full configuration.
        vocabulary: the number of the tokenizer's ids.
        tensor_ranks: the number of ranks that share each layer. It divides the number of heads.
        expert_ranks: the number of ranks that share the experts of a layer. It divides the number of experts, if the
            model has as many.
    """
    return type(config).from_dict(_shrunk(config.to_dict(), _limits(vocabulary, tensor_ranks, expert_ranks)))


def configuration(model: str, trust_remote_code: bool = False, module: str | None = None) -> PreTrainedConfig:
    """Make the tiny configuration of a model type, or of a model in a folder or on the hub.

    Args:
        trust_remote_code: run the code that comes with the model.
        module: a module that registers the model.
    """
    if module is not None:
        importlib.import_module(module)
    if model in CONFIG_MAPPING:
        return tiny_config(model)
    return shrink(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code))


def is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether a type has a masked language model and no causal one."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING


def tiny_model(
    config: PreTrainedConfig,
    attn_implementation: str | None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    auto: Any = None,
) -> PreTrainedModel:
    """Make a model with random weights, which are the same for every value of `attn_implementation`.

    Noise is added to the weights, so that attention is not uniform, and norms and biases differ from 1 and 0.

    Args:
        auto: the auto class; by default that of language models, causal or masked.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = copy.deepcopy(config)  # the model writes the implementation into it
        # A configuration whose code came with the model was loaded by a user who trusts that code.
        trusted = type(config).__module__.startswith("transformers_modules.")
        auto = auto or (AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM)
        model = auto.from_config(config, attn_implementation=attn_implementation, trust_remote_code=trusted)
        if dtype == torch.float64:
            model.set_experts_implementation("eager")  # the default, a grouped product, has no float64
            for module in model.modules():  # of which some have a configuration of their layer
                if hasattr(getattr(module, "config", None), "_experts_implementation_internal"):
                    module.config._experts_implementation_internal = "eager"
        model.to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def _limits(vocabulary: int, tensor_ranks: int, expert_ranks: int) -> _Limits:
    """Compute the limits that `with_small_sizes` applies."""

    def shared(sizes: dict[str, int]) -> dict[str, int]:
        return {name: size * max(2, tensor_ranks) // 2 for name, size in sizes.items()}

    vocabularies = dict.fromkeys(_VOCABULARIES, vocabulary)
    experts = {name: lcm(number, expert_ranks) for name, number in _EXPERTS.items()}
    fixed = shared(_SHARED) | vocabularies
    return _Limits(
        least=dict.fromkeys(_KEY_VALUE_HEADS, tensor_ranks) | fixed,
        most=_AT_MOST | experts | shared(_SHARED_AT_MOST | _KEY_VALUE_HEADS) | fixed,
    )


def _without_randomness(fields: dict[str, Any]) -> dict[str, Any]:
    """Set dropout and jitter to 0 in the fields of a configuration and of the configurations within it."""
    still = {}
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            value = _without_randomness(value)
        elif ("drop" in name or "jitter" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = type(value)(0)
        still[name] = value
    return still


def _with_special_tokens(fields: dict[str, Any], known: dict[int, int]) -> dict[str, Any]:
    """Replace the ids of special tokens by ids from `TEXT` on, which are as equal or different as they were.

    Args:
        known: the replacement of each id so far, to which more are added.
    """

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(entry) for entry in value]
        return known.setdefault(value, TEXT + len(known) % (VOCABULARY - TEXT)) if isinstance(value, int) else value

    for name, value in fields.items():
        if isinstance(value, dict):
            fields[name] = _with_special_tokens(value, known)
        elif isinstance(name, str) and name not in _TOKENS and _SPECIAL.fullmatch(name):
            fields[name] = replaced(value)
    return fields


def _shrunk(fields: dict[str, Any], limits: _Limits) -> dict[str, Any]:
    """Shrink the fields of a configuration, or of one within it."""
    layers = _kept_layers(fields)
    small = {name: _small(name, value, fields, layers, limits) for name, value in fields.items()}
    if fields.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = sum(layer >= _unshared(fields) for layer in layers)
    for name, value in _OWN.get(fields.get("model_type"), {}).items():
        within = isinstance(small.get(name), dict) and "model_type" in small[name]
        small[name] = {**small[name], **value} if within else value
    return small


def _small(name: str, value: Any, fields: dict[str, Any], layers: list[int], limits: _Limits) -> Any:
    if name in _TOKENS:
        return _TOKENS[name]
    if value is None or isinstance(value, (bool, str)):
        return value
    if name == "per_layer_config":
        overrides = {int(layer): override for layer, override in value.items()}
        return {
            new: _in_proportion(overrides[old], fields, limits) for new, old in enumerate(layers) if old in overrides
        }
    if isinstance(value, dict):
        if name.startswith("rope_"):
            return _small_rope(value, fields)
        return _shrunk(value, limits) if "model_type" in value else value
    if name == "image_grid_pinpoints":  # of two tiles each
        side = _shrunk(fields["vision_config"], limits)["image_size"]
        return [[2 * side, side], [side, 2 * side]]
    if isinstance(value, (list, tuple)):
        if name in _INDICES:
            return [new for new, old in enumerate(layers) if old in value]
        if len(value) == _depth(fields):
            return [_small(name, value[layer], fields, layers, limits) for layer in layers]
        return value
    if name in _DEPTHS:
        return min(value, len(layers))
    if name in ("head_dim", "qk_head_dim", "swa_head_dim"):
        return _head_dim(value, fields)
    if name in _KEY_VALUE_HEADS and value == 1:  # one head for all queries, for any number of ranks
        return 1
    if name == "num_key_value_heads" and "kv_lora_rank" in fields:  # latent attention: keys for every query head
        return min(value, limits.most["num_attention_heads"])
    if name == "index_n_heads" and value == fields.get("num_key_value_heads"):  # one for each key/value head
        return limits.applied("num_key_value_heads", value)
    if name == "attention_hidden_size":  # a multiple of the hidden size
        return limits.most["hidden_size"] * (value // fields["hidden_size"])
    patch = fields.get("patch_size")
    if isinstance(patch, int) and (name == "image_size" or (name == "window_size" and value > patch)):  # in pixels
        return min(value, 4 * patch)
    return limits.applied(name, value)


def _depth(fields: dict[str, Any]) -> int:
    """Find the number of layers; for an encoder and a decoder, the larger one."""
    depths = [fields[name] for name in _DEPTHS if isinstance(fields.get(name), int)]
    if not depths and isinstance(fields.get("layers_block_type"), list):  # a list of all layers
        depths = [len(fields["layers_block_type"])]
    return max(depths, default=0)


def _kept_layers(fields: dict[str, Any]) -> list[int]:
    """Choose the layers to keep: at least two, and at least one of each kind that the lists of layers name."""
    depth = _depth(fields)
    kinds: list[set] = [set() for _ in range(depth)]
    for layer in range(depth):
        if fields.get("num_kv_shared_layers"):  # the last layers reuse earlier keys and values
            kinds[layer].add((layer >= _unshared(fields), fields["layer_types"][layer]))
        for name, value in fields.items():
            if name in _INDICES and value is not None:
                kinds[layer].add((name, layer in value))
            elif name == "per_layer_config" and value:
                kinds[layer].add((name, str(value.get(f"{layer:02}"))))
            elif isinstance(value, (list, tuple)) and len(value) == depth:
                kinds[layer].add((name, str(value[layer])))
    kept, missing = [], set().union(*kinds)
    while missing and len(kept) < _LAYERS:
        best = max(range(depth), key=lambda layer: len(kinds[layer] & missing))
        kept.append(best)
        missing -= kinds[best]
    more = [layer for layer in range(depth) if layer not in kept]
    return sorted(kept + more[: max(0, 2 - len(kept))])


def _unshared(fields: dict[str, Any]) -> int:
    """Compute the number of layers that make their own keys and values."""
    return _depth(fields) - fields["num_kv_shared_layers"]


def _head_dim(value: int, fields: dict[str, Any]) -> int:
    """Compute the size of a small head that fits the other small sizes as `value` fits the full ones."""
    rope, nope = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if rope is not None and nope is not None:
        small_rope, small_nope = min(rope, _AT_MOST["qk_rope_head_dim"]), min(nope, _AT_MOST["qk_nope_head_dim"])
        if value in (rope, rope + nope):
            return small_rope if value == rope else small_rope + small_nope
    if axes := _sections(fields):  # at least one frequency for each axis of positions
        return min(value, max(8, 4 * value // sum(axes)))
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return min(value, 8 if width and heads and value * heads == width else 16)


def _sections(fields: dict[str, Any]) -> list[int]:
    """Find the numbers of frequencies of each axis of positions, for a model with three axes."""
    rope = fields.get("rope_parameters") or {}
    found = (part.get("mrope_section") for part in (rope, *rope.values()) if isinstance(part, dict))
    return next((sections for sections in found if sections), [])


def _small_rope(parameters: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Shrink the parameters of RoPE to the frequencies of small heads and to a small range of positions."""
    small = {}
    for name, value in parameters.items():
        if isinstance(value, dict):  # parameters of one kind of layers
            value = _small_rope(value, fields)
        elif isinstance(value, (list, tuple)):
            head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
            share = _head_dim(head, fields) / head
            if name == "mrope_section":  # its sections add up to all frequencies
                total = int(sum(value) * share)
                value = [int(section * share) for section in value]
                value[0] += total - sum(value)
            else:
                value = value[: int(len(value) * share)]
        elif name in _AT_MOST:
            value = min(value, _AT_MOST[name])
        small[name] = value
    return small


def _in_proportion(override: dict[str, Any], fields: dict[str, Any], limits: _Limits) -> dict[str, Any]:
    """Shrink the fields in which one layer differs, in the same proportion as those of the other layers."""
    small = {}
    for name, value in override.items():
        small[name] = max(1, _small(name, fields[name], fields, [], limits) * value // fields[name])
    if "qk_nope_head_dim" in small:
        rope = override.get("qk_rope_head_dim", fields["qk_rope_head_dim"])
        small["head_dim"] = small["qk_nope_head_dim"] + min(rope, _AT_MOST["qk_rope_head_dim"])
    return small
