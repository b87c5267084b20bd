"""Tests of recipes of image-text models: drawn pages, batches of images and text, and training."""

import math

import pytest
import torch
from datasets import Dataset

from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.images import (
    MARGIN,
    PAGE_LINES,
    PAGE_WIDTH,
    ImageCollator,
    draw_pages,
    to_image_documents,
)
from hf_context_parallel.recipe.model import load_model
from hf_context_parallel.recipe.processor import load_processor
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.schema import DataSection, ModelSection
from hf_context_parallel.train import make_trainer
from tests.helpers.recipe import RECIPES

DEMO = RECIPES / "demo_vlm_cpu.yaml"


def collator(**changes):
    return ImageCollator(
        DataSection(**{"path": "text", "max_length": 512, "images": "drawn", **changes}),
        load_processor(ModelSection(type="qwen3_vl", tokenizer="bytes")),
    )


def test_pages_are_drawn_line_by_line():
    pages = draw_pages("a line\n" * (PAGE_LINES + 2) + "word " * 20)
    heights = [page.height for page in pages]
    assert {page.width for page in pages} == {PAGE_WIDTH} and len(heights) == 2
    assert heights[0] == PAGE_LINES * 12 + 2 * MARGIN and heights[1] == 4 * 12 + 2 * MARGIN
    assert all(page.getextrema()[0][0] < 64 for page in pages)
    assert draw_pages("") == []


def test_the_answer_is_learnt_and_images_and_padding_are_not():
    made = collator()
    texts = ["one\ntwo", "only"]
    batch = made([{"text": text} for text in texts])
    tokenizer, image = made.processor.tokenizer, made.processor.image_token_id
    for row, text in enumerate(texts):
        learnt = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row, learnt], batch["input_ids"][row, learnt])
        assert tokenizer.decode(batch["labels"][row, learnt]) == text + "\n"
        assert not learnt[batch["attention_mask"][row] == 0].any()
    images = batch["input_ids"] == image
    assert torch.equal(images, batch["mm_token_type_ids"] == 1)
    grid = batch["image_grid_thw"]
    assert grid.shape == (2, 3) and len(batch["pixel_values"]) == grid.prod(-1).sum() == 4 * images.sum()


def test_rows_are_cut_in_their_answers_alone():
    text = "a line\n" * 9
    whole = collator()([{"text": text}])
    prompt = int((whole["labels"][0] == -100).sum())
    cut = collator(max_length=prompt + 5)([{"text": text}])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, : prompt + 5])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(RecipeError, match=rf"data\.max_length={prompt} leaves no room.*take {prompt} tokens"):
        collator(max_length=prompt)([{"text": text}])


def test_chats_say_where_images_are_or_begin_with_them(tmp_path):
    page = draw_pages("page")[0]
    page.save(tmp_path / "page.png")
    ask = {"role": "user", "content": "what?"}
    inside = {
        "role": "user",
        "content": [{"type": "text", "text": "see "}, {"type": "image"}, {"type": "text", "text": "?"}],
    }
    answer = {"role": "assistant", "content": "that"}
    made = collator(format="chat", images="scans")
    batch = made(
        [
            {"messages": [ask, answer, ask, answer], "scans": [page, str(tmp_path / "page.png")]},
            {"messages": [inside, answer], "scans": page},
            {"messages": [ask, answer], "scans": None},
        ]
    )
    written = [made.processor.tokenizer.decode(ids).replace("<pad>", "") for ids in batch["input_ids"]]
    image = made.processor.image_token * 12 + "\n"
    assert written[0] == f"user: {image}{image}what?\nassistant: that\nuser: what?\nassistant: that\n"
    assert written[1] == f"user: see {image}?\nassistant: that\n"
    assert written[2] == "user: what?\nassistant: that\n"
    assert (batch["labels"] != -100).sum(-1).tolist() == [5, 5, 5]


def test_sizes_of_images_follow_the_recipe():
    few = collator(image_options={"size": {"shortest_edge": 1024, "longest_edge": 16 * 1024}})([{"text": "a\n" * 30}])
    assert few["image_grid_thw"].prod() * 16**2 <= 16 * 1024


def test_a_processor_of_a_folder_makes_the_same_batches(tmp_path):
    text = [{"text": "a\n" * 9}]
    section = DataSection(path="text", max_length=512, images="drawn")
    made = load_processor(ModelSection(type="gemma3", config={"mm_tokens_per_image": 16}, tokenizer="bytes"))
    made.save_pretrained(tmp_path)
    loaded = load_processor(ModelSection(name=str(tmp_path)))
    batches = [ImageCollator(section, processor)(text) for processor in (made, loaded)]
    assert (
        batches[0].keys()
        == batches[1].keys()
        == {"input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values"}
    )
    for name, value in batches[0].items():
        assert torch.equal(value, batches[1][name]), name
    assert int((batches[0]["token_type_ids"] == 1).sum()) == 16
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="has no processor of images with a chat template"):
        load_processor(ModelSection(name=str(tmp_path)))


def test_documents_keep_what_the_collator_reads():
    section = DataSection(path="somewhere", max_length=64, images="scans")
    data = Dataset.from_dict({"text": ["a", " ", "b"], "scans": [["1.png"], [], []], "other": [1, 2, 3]})
    kept = to_image_documents(data, section)
    assert kept.to_list() == [{"text": "a", "scans": ["1.png"]}, {"text": "b", "scans": []}]
    with pytest.raises(RecipeError, match=r"no column 'scans'.*text, other"):
        to_image_documents(data.remove_columns("scans"), section)
    with pytest.raises(RecipeError, match="no document with a text"):
        to_image_documents(data.select([1]), section)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.images=scans", "data.packing=true"], "images='scans' does not fit format='text' and packing=True"),
        (["data.images=scans", "data.format=tokens"], "does not fit format='tokens'"),
        (["data.images=drawn", "data.format=chat"], "texts for images='drawn'"),
        (["data.image_options={do_resize: false}"], "Name their column in images"),
        (["data.images=scans", "trainer=sft"], "data.images is for recipes without a trainer of TRL"),
    ],
)
def test_what_does_not_fit_images_is_refused(minimal, overrides, said):
    with pytest.raises(RecipeError) as error:
        load_recipe(minimal, overrides)
    assert said in str(error.value)


def test_models_and_tokenizers_without_images_are_refused(minimal):
    recipe = load_recipe(minimal, ["data.images=drawn"])
    tokenizer = collator().processor.tokenizer
    with pytest.raises(RecipeError, match="'qwen3' takes no images"):
        load_model(recipe.model, tokenizer, is_image_text=True)
    with pytest.raises(RecipeError, match=r"model\.tokenizer: 'bytes' gives no processor of images"):
        load_processor(recipe.model)


def losses(size: int, folder: str) -> list[float]:
    """Train two steps of the demo on small documents, and return their losses."""
    overrides = [f"training.output_dir={folder}", "training.max_steps=2", "training.disable_tqdm=true"]
    overrides += [f"context_parallel.size={size}", f"data.data_files={folder}/*.txt"]
    trainer = make_trainer(load_recipe(DEMO, overrides), [])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_demo_trains_as_on_one_process(on_ranks, tmp_path):
    for name, lines in (("long", 50), ("short", 9)):
        (tmp_path / f"{name}.txt").write_text("".join(f"line {number} of {name}\n" for number in range(lines)))
    split, other = on_ranks(2, losses, 2, str(tmp_path))
    whole = on_ranks(1, losses, 1, str(tmp_path))[0]
    assert len(whole) == 2 and all(map(math.isfinite, whole))
    assert split == other == pytest.approx(whole, rel=1e-5)
