"""Runner of recipes, started in each process by accelerate's launcher.

accelerate launch --multi_gpu --num_processes 2 -m hf_context_parallel.train RECIPE [OVERRIDES] [--dry-run]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import datasets
import torch.distributed as dist
import typer
from transformers import set_seed

from hf_context_parallel.distributed.last_words import told
from hf_context_parallel.recipe.counts import CountData, Tally, count_prepared, lines_of
from hf_context_parallel.recipe.documents import load_documents, make_collator, to_rows
from hf_context_parallel.recipe.dry_run import made_up_documents, shrink
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.images import ImageCollator, to_image_documents
from hf_context_parallel.recipe.launch import check_world, trusted
from hf_context_parallel.recipe.model import add_lora, load_model, load_reward, load_tokenizer, with_a_name
from hf_context_parallel.recipe.preflight import check_recipe
from hf_context_parallel.recipe.processor import load_processor
from hf_context_parallel.recipe.reading import load_recipe
from hf_context_parallel.recipe.report import write_report
from hf_context_parallel.recipe.schema import Recipe, trl_classes
from hf_context_parallel.trainer.checkpoints import replaced_whole
from hf_context_parallel.trainer.mixin import ContextParallelTrainer


def make_trainer(recipe: Recipe, arguments: Sequence[str], dry_run: bool = False) -> ContextParallelTrainer:
    """Build the Trainer of a recipe, with its model, data and tokenizer.

    Args:
        recipe: the recipe.
        arguments: the arguments of the runner, for an error that shows the right command.
        dry_run: True to train on made-up documents instead of the recipe's data.

    Raises:
        RecipeError: if the number of processes does not fit the recipe, or the model, the tokenizer or the data cannot
            be loaded.
    """
    if not dry_run:
        check_recipe(recipe)
    training = recipe.training_arguments()
    check_world(recipe, training, arguments)
    set_seed(training.seed)
    if recipe.model.trust_remote_code and training.process_index == 0:
        print(trusted(recipe.model.name))
    has_images = recipe.data.images is not None
    processor = load_processor(recipe.model) if has_images else None
    tokenizer = load_tokenizer(recipe.model) if processor is None else processor.tokenizer
    tallies: dict[str, Tally] = {}

    def rows(split: str) -> datasets.Dataset | datasets.IterableDataset:
        tally = tallies[split] = Tally(shared=has_images)
        if dry_run:
            documents = made_up_documents(recipe.data, tokenizer, recipe.trl_columns)
        else:
            documents = load_documents(recipe.data, split, recipe.trl_columns)
        if has_images:
            return to_image_documents(documents, recipe.data, tally)
        return documents if recipe.trainer else to_rows(documents, recipe.data, tokenizer, tally)

    if not training.should_log:
        datasets.disable_progress_bars()
    # The first process of a machine prepares the data, and the others read its cache.
    with training.main_process_first(desc="preparing the data"):
        train_rows = rows(recipe.data.split)
        eval_rows = rows(recipe.data.eval_split) if recipe.data.eval_split else None
    model = load_model(
        recipe.model,
        tokenizer,
        recipe.distributed_config(),
        is_reward=recipe.trainer == "reward",
        is_image_text=has_images,
    )
    lora = recipe.lora_config()
    if lora is not None and recipe.trainer is None:
        model = add_lora(model, lora)
    common = {
        "model": model,
        "args": training,
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "processing_class": processor or tokenizer,
        "context_parallel": recipe.context_parallel,
    }
    if recipe.trainer is None:
        if processor is None:
            collator = make_collator(recipe.data, tokenizer)
        else:
            # The collator does not know of which split a batch is.
            name = recipe.data.split if eval_rows is None else "batches of both splits"
            collator = ImageCollator(recipe.data, processor, tallies.setdefault(name, Tally(shared=True)))
        trainer = ContextParallelTrainer(**common, data_collator=collator)
    else:
        if recipe.rewards:
            common["reward_funcs"] = [load_reward(name) for name in recipe.rewards]
        refers = lora is None and recipe.model.name is None and getattr(training, "beta", 0) != 0
        try:
            with with_a_name(model, training) if refers and recipe.distributed is None else nullcontext():
                trainer = trl_classes(recipe.trainer)[0](**common, peft_config=lora)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise RecipeError(
                f"trainer: {recipe.trainer} refuses it ({type(error).__name__}: {error}). Correct the recipe."
            ) from error
        tallies[recipe.data.split].known = count_prepared(train_rows, trainer.train_dataset, recipe.trainer)
        if recipe.data.eval_split:
            tallies[recipe.data.eval_split].known = count_prepared(eval_rows, trainer.eval_dataset, recipe.trainer)
    if not dry_run:
        trainer.add_callback(CountData(tallies, recipe.context_parallel.size * recipe.tensor_ranks))
    return trainer


def run(path: Path, overrides: Sequence[str], dry_run: bool) -> None:
    """Run a recipe. The report is written to `output_dir`, and the model too unless `save_strategy` is `no`."""
    recipe = load_recipe(path, overrides)
    arguments = [str(path), *overrides, *(["--dry-run"] if dry_run else [])]
    if not dry_run:
        trainer = make_trainer(recipe, arguments)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_state()
        if trainer.args.save_strategy != "no":
            trainer.save_model()
        counts = lines_of(trainer.callback_handler.callbacks)
        if trainer.is_world_process_zero():
            with replaced_whole(trainer.args.output_dir) as folder:
                name = write_report(folder, f"Run of {path}", trainer.state.log_history, counts).name
            print(f"Report: {Path(trainer.args.output_dir, name)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        small, replaced = shrink(recipe, int(os.environ.get("WORLD_SIZE", 1)), folder)
        trainer = make_trainer(small, arguments, dry_run=True)
        if trainer.is_world_process_zero():
            print("\n".join([f"Dry run of {path}. In place of what it names:", *(f"  {line}" for line in replaced)]))
        trainer.train()
        if trainer.is_world_process_zero():
            print(f"The recipe is valid: {path} ran one step.")


def main(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/demo_cpu.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="such as training.max_steps=3")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="one step of a tiny model, offline")] = False,
) -> None:
    """Fine-tune the model of RECIPE, in each process that `accelerate launch` starts."""
    with told():
        run(recipe, overrides or [], dry_run)
    if dist.is_initialized():
        dist.destroy_process_group()  # a thread of it that still runs at the end of Python may abort the process


if __name__ == "__main__":
    typer.run(main)
