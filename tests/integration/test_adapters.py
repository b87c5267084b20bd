"""Adapters of PEFT around a prepared model: several at once, merged, saved and loaded without us."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import hf_context_parallel as hcp
from tests.helpers.models import context, some_labels, tiny_model, tokens

NAME = "context_parallel"


def adapted(attention: str) -> PeftModel:
    """Make a model with two LoRA adapters that are active together, and random weights in all of them."""
    model = get_peft_model(tiny_model("llama", attention), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype) / 10)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = tokens(2, 45)
    return {"input_ids": ids, "labels": some_labels(ids)}


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def compare_adapters(folder: str) -> None:
    cp = context()
    stock, ours = adapted("sdpa").train(), hcp.parallelize(adapted(NAME).train(), cp)
    losses = [model(**batch(), use_cache=False).loss for model in (stock, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=3e-7, atol=0)
    for loss in losses:
        loss.backward()
    for expected, found in zip(gradients(stock), gradients(ours), strict=True):
        torch.distributed.all_reduce(found)
        torch.testing.assert_close(found / cp.size, expected, rtol=1e-5, atol=1e-6)
    ids = batch()["input_ids"]
    expected = stock.eval()(input_ids=ids).logits
    path = Path(folder, f"rank{cp.rank}")
    ours.save_pretrained(path)
    loaded = PeftModel.from_pretrained(tiny_model("llama", "sdpa"), path)  # without us
    loaded.load_adapter(path / "other", "other")
    loaded.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    ours.eval()
    torch.testing.assert_close(ours(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    merged = ours.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


def test_several_adapters_are_exact_merged_and_saved(on_ranks, tmp_path):
    on_ranks(2, compare_adapters, str(tmp_path))
