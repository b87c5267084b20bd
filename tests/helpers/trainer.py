"""Tiny runs of the Trainer, on shards and on whole sequences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import hf_context_parallel as hcp
from tests.helpers.models import some_labels, tiny_model, tokens

STOCK = "stock"
SAMPLES = 8


def samples(count: int = SAMPLES) -> list[dict]:
    """Make documents of many lengths. The first has a single target, so that most ranks have none."""
    return samples_of(9 + 7 * number for number in range(count))


def samples_of(lengths: Iterable[int]) -> list[dict]:
    """Make documents of these lengths. The first has a single target."""
    made = []
    for number, length in enumerate(lengths):
        input_ids = tokens(1, length, seed=number)[0]
        labels = some_labels(input_ids, seed=number)
        if number == 0:
            labels[:] = -100
            labels[3] = input_ids[3]
        made.append({"input_ids": input_ids.tolist(), "labels": labels.tolist()})
    return made


def padding_collator(rows: list[dict], side: str = "right") -> dict[str, torch.Tensor]:
    """Pad rows to one length, and make the attention_mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    batch = {name: [] for name in fill}
    for row in rows:
        for name, value in {**row, "attention_mask": [1] * len(row["input_ids"])}.items():
            padding = [fill[name]] * (longest - len(value))
            batch[name].append(value + padding if side == "right" else padding + value)
    return {name: torch.tensor(value) for name, value in batch.items()}


def left_padding_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    return padding_collator(rows, "left")


def no_labels_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = padding_collator(rows)
    del batch["labels"]
    return batch


def shifted_labels_collator(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = padding_collator(rows)
    batch["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return batch


COLLATORS = {
    "right": padding_collator,
    "left": left_padding_collator,
    "packed": DataCollatorWithFlattening(),
    "no labels": no_labels_collator,
    "shifted labels": shifted_labels_collator,
}


def make_trainer(
    kind,
    folder,
    *,
    model_type="llama",
    collator="right",
    accepts=True,
    model=None,
    data=None,
    settings=None,
    groups=None,
    **arguments,
):
    """Make a Trainer: Transformers' own if `kind` is `STOCK`, otherwise one with CP groups of `kind` ranks.

    It does not verify its model before the first step unless `settings` say so.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    groups = groups or (world if kind == STOCK else world // kind)
    arguments = {"gradient_accumulation_steps": 1, "max_steps": 4, "global_batch": 2, **arguments}
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=arguments.pop("global_batch") // groups,
        per_device_eval_batch_size=1,
        logging_steps=1,
        learning_rate=0.1,
        optim=arguments.pop("optim", "sgd"),  # Adam would turn gradients that are rounding errors into full steps
        save_strategy=arguments.pop("save_strategy", "no"),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **arguments,
    )
    if model is None:
        model = tiny_model(model_type, None if kind == STOCK else "context_parallel", torch.float32)
    if not accepts:
        model.accepts_loss_kwargs = False
    common = {"model": model, "args": args, "train_dataset": samples()}
    if kind == STOCK:
        return Trainer(**common, data_collator=COLLATORS[collator])
    settings = hcp.ContextParallelConfig(**{"size": kind, "verify": False, **(settings or {})})
    return hcp.ContextParallelTrainer(**common, data_collator=COLLATORS[collator], context_parallel=settings)


def history(kind, folder, options) -> list[tuple[float, float]]:
    """Train, and return loss and gradient norm of each step."""
    trainer = make_trainer(kind, folder, **options)
    trainer.train()
    return steps_of(trainer)


def history_and_weights(kind, folder, options) -> tuple[list[tuple[float, float]], np.ndarray]:
    """Train, and return loss and gradient norm of each step, and all weights at the end."""
    return trained(make_trainer(kind, folder, **options))


def trained(trainer) -> tuple[list[tuple[float, float]], np.ndarray]:
    """Train, and return loss and gradient norm of each step, and all weights at the end."""
    trainer.train()
    return steps_of(trainer), torch.cat(
        [parameter.detach().flatten() for parameter in trainer.model.parameters()]
    ).numpy()


def steps_of(trainer) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step that was logged."""
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def check_training(found, expected, what: str = "") -> None:
    """Compare what `trained` returns: losses and norms to 1e-5, weights to 1e-5 of the largest."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, err_msg=what)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5 * np.abs(expected[1]).max(), err_msg=what)


def random_crops(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Crop each row to a random length, drawn from torch's generator, as data augmentation does."""
    kept = [int(torch.randint(5, len(row["input_ids"]) + 1, ())) for row in rows]
    return padding_collator([{name: value[:n] for name, value in row.items()} for row, n in zip(rows, kept)])
