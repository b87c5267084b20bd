"""Tests of sequence parallelism: what it divides, and its dropout."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import hf_context_parallel as hcp
from tests.helpers.models import needs_sharding_while_loading
from tests.helpers.tensor_parallel import TP_CP, batch, saved, tensor_parallel_model

pytestmark = needs_sharding_while_loading


def shapes(folder, sequence_parallel) -> tuple[set[int], int, torch.Tensor, torch.Tensor]:
    """Return the tokens that norms see, the bytes that a layer saves outside of regions, and the gathered logits."""
    model = tensor_parallel_model(folder, dtype=torch.float32, **TP_CP)
    settings = hcp.ContextParallelConfig(size=2, sequence_parallel=sequence_parallel)
    cp = hcp.ContextParallel(settings, hcp.mesh_of(model))
    layer = model.model.layers[1]
    tokens_seen, saved_bytes, inside = set(), [], []
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_pre_hook(lambda _, args: tokens_seen.add(args[0].shape[1]))
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_pre_hook(lambda *_: inside.append(True))
        norm.register_forward_hook(lambda *_: inside.clear())

    def pack(x):
        if inside and x.dim() == 3:
            saved_bytes.append(x.numel() * x.element_size())
        return x

    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with cp.shard(inputs, model) as local, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = cp.gather(model(**local).logits)
    return tokens_seen, sum(saved_bytes), logits.detach()


def test_sequence_parallelism_divides_what_norms_see_and_save_by_the_tp_size(on_ranks, tmp_path):
    folder = saved(tmp_path, "llama")
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    # 45 tokens are 48 with the layout's padding, of which a rank holds 24 and its TP group 12 each.
    whole_rows = on_ranks(4, shapes, folder, False)
    shared_rows = on_ranks(4, shapes, folder, True)
    for (seen, size, logits), (fewer_seen, less, same_logits) in zip(whole_rows, shared_rows):
        assert seen == {24} and fewer_seen == {12}
        assert less * 2 == size > 0
        torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same_logits[real], expected[real], rtol=1e-4, atol=1e-5)


def drawn(folder, sequence_parallel) -> float:
    """Return a random number drawn while a model is trained."""
    model = tensor_parallel_model(folder, dtype=torch.float32, **TP_CP).train()
    settings = hcp.ContextParallelConfig(size=2, sequence_parallel=sequence_parallel)
    cp = hcp.ContextParallel(settings, hcp.mesh_of(model))
    numbers = []
    model.model.layers[0].register_forward_hook(lambda *_: numbers.append(float(torch.rand(()))))
    torch.manual_seed(0)
    with cp.shard(batch(), model) as local:
        model(**local)
    return numbers[0]


def test_dropout_is_the_same_where_tokens_are_and_differs_where_they_do(on_ranks, tmp_path):
    folder = saved(tmp_path, "llama")
    # Ranks 0 and 1 are a TP group, whose ranks hold the same tokens, unless sequence parallelism divides them.
    first, second, third, fourth = on_ranks(4, drawn, folder, False)
    assert first == second and third == fourth and first != third
    assert len(set(on_ranks(4, drawn, folder, True))) == 4
