"""A model of a user, written against the attention interface of Transformers."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class OwnConfig(PreTrainedConfig):
    model_type = "own_model_of_a_user"

    def __init__(
        self, vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mixes=False, **kwargs
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.mixes = num_attention_heads, mixes
        super().__init__(**kwargs)


class OwnAttention(torch.nn.Module):
    is_causal = True

    def __init__(self, config: OwnConfig):
        super().__init__()
        self.config = config
        self.projection = torch.nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        heads = self.config.num_attention_heads
        q, k, v = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in self.projection(hidden_states).chunk(3, dim=-1)
        )
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(self, q, k, v, attention_mask, scaling=q.shape[-1] ** -0.5, dropout=0.0)
        output = output.flatten(2)
        return output.cumsum(1) if self.config.mixes else output  # the sum mixes tokens where no rank sees it


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(OwnAttention(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        hidden = hidden + torch.sin(position_ids)[..., None].to(hidden.dtype)
        for layer in self.layers:
            hidden = hidden + layer(hidden, attention_mask=mask)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


def own_model(attention: str, mixes: bool = False) -> OwnModel:
    """Make a model of a user in float64."""
    torch.manual_seed(0)
    return OwnModel._from_config(OwnConfig(mixes=mixes), attn_implementation=attention).double()
