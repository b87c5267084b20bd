"""Refusals of tuners of PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    CPTConfig,
    LilyConfig,
    LoHaConfig,
    LoraConfig,
    PolyConfig,
    VeloraConfig,
    XLoraConfig,
    get_peft_model,
)

import hf_context_parallel as hcp
from hf_context_parallel.integration.switches import sharded_on_one_rank
from tests.helpers.models import context, labelled, loss_in, tiny_model


def test_prefix_tuning_is_refused():
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    model = tiny_model("llama", "context_parallel", torch.float32)
    model = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5))
    with (
        pytest.raises(ValueError, match=r"with all that cp\.shard yields"),
        context().shard(labelled(), model) as local,
    ):
        model(**local)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdaLoraConfig(total_step=10, task_type="CAUSAL_LM"), "AdaLoraModel does more than calling the model"),
        (LoHaConfig(rank_dropout=0.1, target_modules=["q_proj"]), "'default' has rank_dropout=0.1"),
        (LoHaConfig(module_dropout=0.1, target_modules=["q_proj"]), "'default' has module_dropout=0.1"),
    ],
    ids=["AdaLoRA", "rank dropout", "module dropout"],
)
def test_tuners_that_do_more_or_draw_weights_are_refused(config, message):
    model = get_peft_model(tiny_model("llama", "context_parallel", torch.float32), config).train()
    with pytest.raises(ValueError, match=message):
        loss_in(labelled(), model)


def test_x_lora_is_refused(tmp_path):
    def model():
        return tiny_model("llama", "context_parallel", torch.float32, use_cache=False)

    get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path)
    hidden_size = model().config.hidden_size
    config = XLoraConfig("CAUSAL_LM", hidden_size=hidden_size, adapters={"0": str(tmp_path)})
    tuned = get_peft_model(model(), config)
    cp = context()
    with sharded_on_one_rank(), pytest.raises(ValueError, match=r"'default' is of the type XLORA.*Take LoRA"):
        hcp.parallelize(tuned, cp)(**labelled())
    with pytest.raises(ValueError, match="XLoraModel does more than calling the model"), cp.shard(labelled(), tuned):
        pass


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LilyConfig(target_modules=["q_proj"]),
            "type LILY, which weighs its experts by a mean over all tokens",
        ),
        (PolyConfig(target_modules=["q_proj"]), "of the type POLY, which draws"),
        (
            LoraConfig(target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4)),
            "init_type='batch_average', which projects by a mean over all tokens",
        ),
        (
            CPTConfig("CAUSAL_LM", cpt_token_ids=[3], cpt_mask=[1], cpt_tokens_type_mask=[1]),
            "type CPT, which computes its loss from logits",
        ),
    ],
    ids=["Lily", "Poly", "VeLoRA", "CPT"],
)
def test_tuners_that_look_at_whole_batches_or_logits_are_refused(config, message):
    model = get_peft_model(tiny_model("llama", "context_parallel", torch.float32), config).train()
    with sharded_on_one_rank(), pytest.raises(ValueError, match=message):
        hcp.parallelize(model, context())(**labelled(), task_ids=torch.zeros(2, dtype=torch.long))


def test_tuners_that_draw_nothing_in_evaluation_are_not():
    config = LoHaConfig(module_dropout=0.1, target_modules=["q_proj"])
    loss_in(labelled(), get_peft_model(tiny_model("llama", "context_parallel", torch.float32), config).eval())
    loss_in(labelled(), get_peft_model(tiny_model("llama", "context_parallel", torch.float32), LoraConfig()).train())
