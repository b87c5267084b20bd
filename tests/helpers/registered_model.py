"""A model type of a user, which this module registers with Transformers."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class RegisteredConfig(LlamaConfig):
    model_type = "registered_by_a_user"


class RegisteredForCausalLM(LlamaForCausalLM):
    config_class = RegisteredConfig


AutoConfig.register("registered_by_a_user", RegisteredConfig, exist_ok=True)
AutoModelForCausalLM.register(RegisteredConfig, RegisteredForCausalLM, exist_ok=True)
