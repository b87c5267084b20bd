"""Vision towers: their facts, their bytes beside sums made by hand, and the peak of a step beside its count."""

import ctypes
import gc
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import hf_context_parallel as hcp
from benchmarks.memory import M_MMAP_THRESHOLD, on_ranks
from hf_context_parallel.distributed import buffers
from hf_context_parallel.memory.facts import facts_of, has_images
from hf_context_parallel.memory.job import Job
from hf_context_parallel.memory.parts import parts_of
from hf_context_parallel.memory.tower_facts import TowerFacts, TowerSizes
from hf_context_parallel.memory.tower_parts import TowerParts
from hf_context_parallel.trainer.memory import PeakMemory

SIDE, WIDTH, DEPTH, PATCH = 32, 128, 4, 8
IMAGE, VIDEO, START, END = 250, 251, 252, 253
TOKENS = SIDE**2 // 4  # of an image


TEXT = {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 2**20}


def config():
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    tower = {"depth": DEPTH, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_heads": 4, "patch_size": PATCH}
    tower |= {"out_hidden_size": 128, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    return Qwen3VLConfig(text_config=text, vision_config=tower, vision_end_token_id=END, **marks)


def test_facts_of_a_model_with_a_tower():
    facts = facts_of(config(), images=True)
    text = facts_of(AutoConfig.for_model("qwen3", **TEXT))
    assert (facts.layers, facts.hidden, facts.key_heads, facts.head_parameters) == (4, 128, 1, text.head_parameters)
    assert facts.layer_parameters == text.layer_parameters
    assert facts.parameters - facts.tower_parameters == text.parameters
    numbers = 3 * 2 * PATCH**2
    tower = TowerFacts(TowerSizes(WIDTH, 3 * WIDTH, DEPTH), facts.tower_parameters, 4, 4, numbers, levels=2)
    assert facts.tower == tower
    adapters = facts_of(config(), 2, images=True)
    assert not adapters.tower.trained and adapters.trained_parameters == adapters.lora_parameters


def test_towers_whose_embeddings_get_gradients():
    assert not facts_of(config()).tower.woken
    assert facts_of(AutoConfig.for_model("qwen2_5_vl")).tower.woken
    gemma = facts_of(AutoConfig.for_model("gemma3", vision_config={"image_size": 896, "patch_size": 14}), images=True)
    assert (gemma.tower.merge, gemma.tower.item, gemma.tower.woken) == (16, 4096, True)


def test_models_with_and_without_a_tower():
    assert has_images(config()) and not has_images(AutoConfig.for_model("llama"))
    hybrid = AutoConfig.for_model("qwen3_5")
    assert facts_of(hybrid).tower is None and facts_of(hybrid, images=True).tower is not None


def job(cp=1, **changes):
    facts = replace(facts_of(config(), images=True), **changes)
    return Job(facts, 4096, cp=cp, dtype=torch.float32, kernel="cpu", image_tokens=2048)


def frozen(job):
    return replace(job, facts=replace(job.facts, tower=replace(job.facts.tower, trained=False)))


def test_bytes_of_a_tower():
    one, features = 4 * 2048 * WIDTH * 4, 2048 * 128 * 4
    parts = TowerParts(job())
    assert parts.pixels == 4 * 2048 * 384 * 4 and parts.features == parts.joined == 3 * features
    positions = one * 0.5
    assert parts.forward == 2 * features + one + positions + 10 * one
    assert parts.kept == (DEPTH + 1) * one + 3 * 3 * one + positions
    assert parts.backward == (11 + 6) * one + (3 + 1) * one - 3 * one
    still = TowerParts(frozen(job()))
    assert (still.kept, still.backward, still.gradients) == (0, 0, 0) and still.forward == parts.forward
    assert TowerParts(replace(job(), batches=3)).pixels == 3 * parts.pixels
    shared = TowerParts(job(cp=2))
    assert shared.kept == parts.kept / 2 and shared.pixels == parts.pixels and shared.features == parts.features / 2
    without = TowerParts(replace(job(), image_tokens=0))
    assert set(vars(without).values()) == {0}


def test_weights_of_a_tower():
    facts, size = job().facts, job().facts.tower_parameters * 4
    with_tower, text = parts_of(job()), facts.parameters * 4 - size
    assert with_tower.phases["optimizer"].weights == text + size
    still = parts_of(frozen(job())).phases["optimizer"]
    assert (still.weights, still.gradients, still.optimizer) == (text + size, text, 2 * text)
    whole = parts_of(job()).phases["backward of the tower"].gradients
    sharded = parts_of(replace(job(), fsdp=4))
    assert whole == text + size
    assert sharded.phases["optimizer"].gradients == (text + size) / 4
    assert sharded.phases["backward of the tower"].gradients == text / 4 + size  # until they are scattered


def batch(images, text):
    ids = ([START] + [IMAGE] * TOKENS + [END]) * images + [7] * text
    ids = torch.tensor([ids])
    pixels = torch.randn(images * SIDE**2, 6 * PATCH**2)
    grids = torch.tensor([[1, SIDE, SIDE]] * images)
    kinds = ids.eq(IMAGE).int()
    images = {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}
    return {"input_ids": ids, "labels": ids, **images}


def stepper(checkpointing, trained):
    torch.manual_seed(0)
    attention = {"": "context_parallel", "text_config": "context_parallel", "vision_config": "sdpa"}
    model = Qwen3VLForConditionalGeneration._from_config(config(), attn_implementation=attention).train()
    model.model.visual.requires_grad_(trained)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    size = dist.get_world_size() if dist.is_initialized() else 1
    settings = hcp.ContextParallelConfig(size=size, comm_type="p2p", attention_checkpoints="off")
    model = hcp.parallelize(model, hcp.ContextParallel(settings))
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)

    def step(inputs):
        model(**inputs).loss.backward()
        if size > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(checkpointing, trained, images, text):
    """Measure the bytes of a step at its peak, after steps in which libraries take what they take once."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    step = stepper(checkpointing, trained)
    step(batch(2, 8))
    del step
    buffers._pool = buffers.BufferPool()
    gc.collect()
    watch = PeakMemory(torch.device("cpu"))
    watch.start()
    step = stepper(checkpointing, trained)
    step(batch(2, 8))
    step(batch(images, text))
    return watch.peak() * 2**30


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "ranks, checkpointing, trained, images, text",
    [
        (1, True, False, 16, 64),
        (1, True, True, 16, 64),
        (1, False, True, 16, 64),
        (2, True, False, 16, 64),
        (2, True, True, 16, 64),
        (2, True, False, 16, 4096),
    ],
)
def test_the_peak_of_a_step_is_as_counted(ranks, checkpointing, trained, images, text):
    found = max(on_ranks(ranks, peak, checkpointing, trained, images, text))
    tokens = images * (TOKENS + 2) + text
    here = replace(job(cp=ranks), tokens=tokens, image_tokens=images * TOKENS, checkpointing=checkpointing)
    counted = parts_of(here if trained else frozen(here)).total
    assert found == pytest.approx(counted, rel=0.1)
