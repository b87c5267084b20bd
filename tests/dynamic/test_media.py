"""Images of samples that are dealt to groups: which are whose, how they are joined, and what they weigh."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import hf_context_parallel as hcp
from hf_context_parallel.dynamic.costs import LLAMA_8B, Costs
from hf_context_parallel.dynamic.media import MediaOfModel
from hf_context_parallel.dynamic.samples import cut
from hf_context_parallel.dynamic.schedule import make_schedule
from hf_context_parallel.dynamic.scheduler import Scheduler
from hf_context_parallel.planning.machine import CPU, H100_NODE
from tests.helpers.images import MARKS, image_collator, image_model, image_samples
from tests.helpers.towers import FAMILIES, drawn, multimodal

IMAGES = ((0,), (1, 0), (), (1,))
BY_TOKEN = ("input_ids", "labels", "mm_token_type_ids")


def media_of(model_type: str, images=IMAGES) -> tuple[MediaOfModel, list[dict], dict]:
    """Return the media of a tiny model, samples with images, and the batch of them."""
    samples = image_samples(model_type, images)
    return MediaOfModel(image_model(model_type, None)), samples, image_collator(samples)


# Cutting


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3", "llava"])
def test_each_sample_gets_its_own_images(model_type):
    media, samples, batch = media_of(model_type)
    found = cut(batch, media)
    assert len(found) == len(samples)
    for sample, expected in zip(found, samples):
        assert torch.equal(sample.table[0], expected["input_ids"])
        assert sample.media.keys() == expected.keys() & set(media.names)
        for name, x in sample.media.items():
            assert torch.equal(x, expected[name])


def test_documents_of_a_packed_row_get_their_own_images():
    media, samples, _ = media_of("qwen3_vl")
    batch = {name: torch.cat([sample[name] for sample in samples])[None] for name in BY_TOKEN}
    batch |= {name: torch.cat([x[name] for x in samples if name in x]) for name in media.names if name in samples[0]}
    batch["position_ids"] = torch.cat([torch.arange(len(x["input_ids"])) for x in samples])[None]
    found = cut(batch, media)
    assert [len(x.media.get("image_grid_thw", ())) for x in found] == [len(x) for x in IMAGES]
    for sample, expected in zip(found, samples):
        assert all(torch.equal(x, expected[name]) for name, x in sample.media.items())


def test_positions_are_those_of_a_sample_alone():
    media, samples, batch = media_of("qwen3_vl")
    index = image_model("qwen3_vl", None).model.get_rope_index
    for sample, own in zip(cut(batch, media), samples):
        expected = torch.arange(len(own["input_ids"])).expand(3, -1)
        if "image_grid_thw" in own:
            types = own["mm_token_type_ids"][None]
            expected = index(own["input_ids"][None], mm_token_type_ids=types, image_grid_thw=own["image_grid_thw"])
            expected = expected[0][:, 0]
        assert torch.equal(sample.table[3:6], expected)


def test_positions_that_a_batch_gives_are_those_of_all_axes():
    """Keep positions of packed documents as they were given, as Transformers does."""
    media, samples, _ = media_of("qwen3_vl", ((0,),))
    batch = {name: x[None] if name in BY_TOKEN else x for name, x in samples[0].items() if name != "attention_mask"}
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    [sample] = cut(batch, media)
    assert torch.equal(sample.table[3:6], batch["position_ids"].expand(3, -1))


def test_placeholders_that_do_not_fit_are_explained():
    media, samples, batch = media_of("qwen3_vl", ((0,),))
    wrong = with_another_number(batch)
    wrong["mm_token_type_ids"] = (wrong["input_ids"] == MARKS["qwen3_vl"][1]).long()
    with pytest.raises(ValueError, match="Make the whole batch by the processor of the model"):
        cut(wrong, media)
    with pytest.raises(ValueError, match="pixel_values is a list, and with dynamic=True it must be a tensor"):
        cut({**batch, "pixel_values": list(samples[0]["pixel_values"])}, media)


def test_joined_samples_are_one_batch():
    media, samples, batch = media_of("qwen3_vl")
    found = cut(batch, media)
    chosen = [found[3], found[2], found[1]]
    joined = media.joined([sample.media for sample in chosen])
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(joined[name], torch.cat([samples[3][name], samples[1][name]]))
    assert media.joined([found[2].media]) == {}


def test_images_of_a_row_are_joined_along_the_row():
    media = MediaOfModel(multimodal("idefics3", None))
    parts = [{"pixel_values": drawn(1, n, 3, 16, side)} for n, side in ((2, 16), (1, 16))]
    assert media.joined(parts)["pixel_values"].shape == (1, 3, 3, 16, 16)


# Refusals


def with_another_number(batch: dict) -> dict:
    ids = batch["input_ids"].clone()
    ids[tuple((ids == MARKS["qwen3_vl"][1]).nonzero()[0])] = 5
    return {**batch, "input_ids": ids}


def without_types(batch: dict) -> dict:
    return {name: x for name, x in batch.items() if name != "mm_token_type_ids"}


def with_undivided(batch: dict) -> dict:
    return {**batch, "image_grid_thw": batch["image_grid_thw"] + 1}


@pytest.mark.parametrize(
    "change, said",
    [
        (with_another_number, "not clear which of the 4 images belong to which of 4 samples"),
        (without_types, "the batch has media and no mm_token_type_ids"),
        (with_undivided, "cannot be divided by images: pixel_values"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(change, said):
    media, _, batch = media_of("qwen3_vl")
    with pytest.raises(ValueError, match=said):
        cut(change(batch), media)


def test_images_of_unequal_tokens_are_not_told_apart_by_shares():
    """Refuse images that have tokens by their shapes, where two small ones weigh as much as a large one."""
    media, _, _ = media_of("llava")
    ids = torch.full((2, 20), 5)
    ids[0, :8] = ids[1, :16] = 48
    spans = [(0, 0, 20), (1, 0, 20)]
    batch = {"pixel_values": drawn(3, 3, 56, 56)}
    [kind] = [x for x in media.kinds if x.name == "image"]
    for described in ("spatial_shapes", "image_merge_sizes"):
        media.kinds = [kind._replace(arguments=("pixel_values", described))]
        media.names = media.kinds[0].arguments
        with pytest.raises(ValueError, match="not clear which of the 3 images belong to which of 2 samples"):
            media.cut({**batch, described: torch.tensor([[2, 2], [2, 2], [4, 4]])}, ids, spans)
        assert media.cut({**batch, described: torch.ones(3, 2)}, ids, spans[:1])[0].keys() == {
            "pixel_values",
            described,
        }


def test_types_without_packed_rows_are_refused():
    model = image_model("qwen3_vl", None)
    _, _, batch = media_of("qwen3_vl")
    model.config.model_type = "blip-2"
    with pytest.raises(ValueError, match="blip-2 has not been found exact with images in packed rows"):
        cut(batch, MediaOfModel(model))


def messages_of_ranks() -> list[str]:
    """Schedule batches that cannot be dealt: images of two shapes, and towers that FSDP gathers."""
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2, dynamic=True, max_tokens_per_rank=64))
    model = image_model("llava", "context_parallel")
    scheduler, batch = Scheduler(cp, model), image_collator(image_samples("llava", ((0,), (0,))))
    if cp.groups.data_rank:
        batch["pixel_values"] = batch["pixel_values"][..., :-1]
    found = []
    for prepare in (lambda: None, lambda: fully_shard(model.model.vision_tower)):
        prepare()
        with pytest.raises(ValueError) as caught:
            scheduler.rounds([batch])
        found.append(str(caught.value))
    return found


def test_media_that_cannot_be_dealt_are_refused_on_every_rank(on_ranks):
    found = on_ranks(4, messages_of_ranks)
    assert all(x == found[0] for x in found)
    shapes, sharded = found[0]
    assert "the images of sample 0 of data rank 0 and of sample 0 of data rank 1 differ" in shapes
    assert "FSDP shards model.vision_tower." in sharded


# What travels


def dealt() -> tuple[int, list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Schedule the samples of two data ranks, and return what this rank computes in each round."""
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2, dynamic=True, max_tokens_per_rank=20))
    scheduler = Scheduler(cp, image_model("qwen3_vl", "context_parallel"))
    batch = image_collator(image_samples("qwen3_vl", WITH_MANY)[cp.groups.data_rank :: 2])
    empty = torch.zeros(0)
    rounds = [
        (x.size, x.batch["input_ids"][0], x.batch.get("pixel_values", empty), x.batch["position_ids"])
        for x in scheduler.rounds([batch])
    ]
    return cp.groups.data_rank, rounds


WITH_MANY = ((), (0,), (1,), (), (0,), (0, 0))


def test_images_travel_with_their_samples(on_ranks):
    samples = image_samples("qwen3_vl", WITH_MANY)
    sizes, seen = set(), []
    for rank, (_, rounds) in enumerate(on_ranks(4, dealt)):
        for size, ids, pixels, positions in rounds:
            sizes.add(size)
            row = ids.tolist()
            inside = [n for n, x in enumerate(samples) if _find(row, x["input_ids"].tolist()) is not None]
            inside.sort(key=lambda n: _find(row, samples[n]["input_ids"].tolist()))
            expected = [samples[n]["pixel_values"] for n in inside if "pixel_values" in samples[n]]
            assert torch.equal(pixels, torch.cat(expected)) if expected else not len(pixels)
            assert positions.shape[:-1] == ((4, 1) if expected else (1,))
            if rank % size == 0:
                seen += inside
    assert sorted(seen) == list(range(len(samples))) and sizes == {1, 2}


def _find(row: list[int], part: list[int]) -> int | None:
    return next((n for n in range(len(row)) if row[n : n + len(part)] == part), None)


# Costs


def test_work_of_towers_is_counted_for_all_items_and_for_the_largest():
    media, _, batch = media_of("qwen3_vl")
    vision = image_model("qwen3_vl", None).config.vision_config
    width, inner, layers = vision.hidden_size, vision.intermediate_size, vision.depth

    def products(rows: int, columns: int) -> int:
        patches = rows * columns
        return 3 * layers * (patches * 2 * width * (2 * width + inner) + 2 * width * patches**2)

    small, large = products(4, 4), products(4, 8)
    works = [media.work(sample.media) for sample in cut(batch, media)]
    assert works == [(small, small), (small + large, large), (0, 0), (large, large)]


def test_frozen_towers_take_a_third():
    model = image_model("qwen3_vl", None)
    _, _, batch = media_of("qwen3_vl")
    trained = [MediaOfModel(model).work(sample.media)[0] for sample in cut(batch, MediaOfModel(model))]
    model.model.visual.requires_grad_(False)
    frozen = [MediaOfModel(model).work(sample.media)[0] for sample in cut(batch, MediaOfModel(model))]
    assert trained == [3 * work for work in frozen]


@pytest.mark.parametrize("machine", [CPU, H100_NODE])
def test_a_row_takes_as_long_as_its_towers_and_its_text(machine):
    costs = Costs.of(LLAMA_8B, machine)
    lengths, documents = np.array([500, 300, 200]), np.array([2, 1])
    media = np.array([[4e12, 1e12], [2e12, 2e12], [0, 0]])
    text = costs.rows(lengths, documents, 4)
    found = costs.rows(lengths, documents, 4, media=media) - text
    np.testing.assert_allclose(found, [max(6e12 / 4, 2e12) * 2 / machine.linear, 0], atol=1e-12)
    alone = costs.sample(lengths, 2, media) - costs.sample(lengths, 2)
    np.testing.assert_allclose(alone, np.array([2e12, 2e12, 0]) * 2 / machine.linear, atol=1e-12)


def test_samples_with_many_images_are_spread():
    """Deal samples of equal lengths, of which some have the work of many images, to groups."""
    lengths, costs = [2000] * 8, Costs.of(LLAMA_8B, H100_NODE)
    works = [(8e15, 1e15)] * 2 + [(0, 0)] * 6
    schedule = make_schedule(lengths, 8, 8, 16_384, costs, media=works)
    blind = make_schedule(lengths, 8, 8, 16_384, costs)
    of_many = [group.size for groups in schedule.rounds for group in groups if set(group.samples) & {0, 1}]
    assert min(of_many) > 1
    told = type(blind)(blind.lengths, blind.ranks, blind.rounds, costs, media=tuple(works))
    assert schedule.total < 0.7 * told.total


def test_towers_of_all_kinds_are_known():
    names = {name: MediaOfModel(multimodal(name, None)).names for name in FAMILIES}
    assert names["qwen2_5_vl"] == ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    assert names["llava"][0] == "pixel_values" and "input_features" in names["glmasr"]
    assert MediaOfModel(image_model("qwen3_vl", None).model.language_model).names == ()
    assert not dist.is_initialized()
