"""Trainer on shards against Trainer on whole sequences: the same losses and gradient norms, step by step."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from hf_context_parallel.verification.types.tiny import tiny_config
from tests.helpers.models import tiny_model
from tests.helpers.trainer import (
    STOCK,
    check_training,
    history,
    history_and_weights,
    make_trainer,
    padding_collator,
    random_crops,
    samples,
    trained,
)

CASES = {
    "padding": {},
    "left padding": {"collator": "left"},
    "packing": {"collator": "packed"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "packing with accumulation": {"collator": "packed", "gradient_accumulation_steps": 3},
    "tokens not averaged": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
    "a model that takes no loss keywords": {"accepts": False, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True, "collator": "packed"},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "workers": {"dataloader_num_workers": 2},
}
SIMPLER = {
    *("padding", "packing", "accumulation", "workers"),
    *("tokens not averaged", "gradient checkpointing", "reentrant checkpointing"),
}
"""Cases that other ones contain, or that make test-all runs alone."""
DEPENDS_ON_GROUPS = ("left padding", "tokens not averaged", "a model that takes no loss keywords")
"""Cases in which two data-parallel ranks differ from one process even without CP.

They pad to other lengths, or Trainer takes the mean of each rank's loss. With two groups, the reference is therefore
two processes."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in SIMPLER)) for case in CASES]
)
def test_losses_and_gradient_norms_are_those_of_one_process(on_ranks, tmp_path, case):
    check_histories(on_ranks, tmp_path, case, [(2, 2), (4, 2)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_of_four_ranks_are_those_of_one_process(on_ranks, tmp_path, case):
    check_histories(on_ranks, tmp_path, case, [(4, 4)])


def check_histories(on_ranks, folder, case, runs: list[tuple[int, int]]) -> None:
    """Compare runs, each given as its number of ranks and its CP size, with the stock Trainer on whole sequences."""
    options = CASES[case]
    processes = {run: run[0] // run[1] if case in DEPENDS_ON_GROUPS else 1 for run in runs}
    run = history_and_weights
    expected = {count: on_ranks(count, run, STOCK, folder, options)[0] for count in {*processes.values()}}
    assert {len(steps) for steps, _ in expected.values()} == {4}
    for ranks, size in runs:
        for found in on_ranks(ranks, run, size, folder, options):
            check_training(found, expected[processes[ranks, size]], f"{ranks} ranks, CP {size}")


@pytest.mark.parametrize("settings", [{}, {"dynamic": True, "max_tokens_per_rank": 64}], ids=["static", "dynamic"])
def test_batches_may_bring_labels_that_are_shifted_already(on_ranks, tmp_path, settings):
    options = {"gradient_accumulation_steps": 2}
    [expected] = on_ranks(1, history, STOCK, tmp_path, options)
    options |= {"collator": "shifted labels", "settings": settings}
    for found in on_ranks(2, history, 2, tmp_path, options):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def mean_loss_of_a_run(kind, folder, options) -> list[float]:
    """Train, and return the mean loss, the samples of a step by the logs, and the epoch and rate of each log."""
    trainer = make_trainer(kind, folder, max_steps=3, **options)
    trainer.args.logging_steps = 2  # no log contains the last step
    loss, *logs, last = trainer.train().training_loss, *trainer.state.log_history
    samples_of_a_step = round(last["train_samples_per_second"] / last["train_steps_per_second"], 1)
    steps = [entry[name] for entry in logs for name in ("epoch", "learning_rate", "step")]
    return [loss, last["train_loss"], samples_of_a_step, last["epoch"], *steps]


@pytest.mark.parametrize("settings", [{}, {"dynamic": True, "max_tokens_per_rank": 64}], ids=["static", "dynamic"])
def test_the_mean_loss_of_a_run_is_that_of_one_process(on_ranks, tmp_path, settings):
    [expected] = on_ranks(1, mean_loss_of_a_run, STOCK, tmp_path, {})
    for ranks in (2, 4):
        for found in on_ranks(ranks, mean_loss_of_a_run, 2, tmp_path, {"settings": settings}):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def prepared_by_a_subclass(kind, folder, settings) -> tuple[list[float], float, np.ndarray, list[tuple]]:
    """Train a subclass whose `_prepare_inputs` masks labels, as for prompts.

    Returns:
        The losses, and the shapes of the inputs that the subclass was given.
    """
    trainer = make_trainer(kind, folder, settings=settings)
    shapes = []

    class Masking(type(trainer)):
        def _prepare_inputs(self, inputs):
            shapes.append(tuple(inputs["input_ids"].shape))
            inputs = super()._prepare_inputs(inputs)
            inputs["labels"][inputs["input_ids"] % 2 == 0] = -100
            return inputs

    trainer.__class__ = Masking
    trainer.train_dataset = data = samples()[1:]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = trainer.evaluate(data)["eval_loss"]
    return losses, loss, trainer.predict(data).label_ids, shapes


def test_a_subclass_prepares_each_whole_batch_once(on_ranks, tmp_path):
    [(losses, loss, labels, shapes)] = on_ranks(1, prepared_by_a_subclass, STOCK, tmp_path, None)
    assert len(shapes) == 4 + 7 + 7
    for found in on_ranks(2, prepared_by_a_subclass, 2, tmp_path, {}):
        np.testing.assert_allclose(found[0], losses, rtol=1e-5)
        np.testing.assert_allclose(found[1], loss, rtol=1e-5)
        np.testing.assert_array_equal(found[2], labels)
        assert found[3] == shapes


# Losses, heads and metrics of a user


def mean_of_tokens(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Compute a loss for the Trainer's `compute_loss_func`: a sum over tokens, divided by the count."""
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return losses / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum())


def with_own_loss(trainer):
    """Let a trainer compute a loss of its own: a mean over the last tokens of rows, and a distance to a teacher."""

    class OwnLoss(type(trainer)):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            with torch.no_grad():
                wanted = self.teacher(**inputs).logits.softmax(-1)
            mask = inputs["attention_mask"][..., None]
            distance = ((outputs.logits.softmax(-1) - wanted).pow(2) * mask).sum() / mask.sum()
            last = inputs["attention_mask"].sum(1) - 1
            chosen = outputs.logits[torch.arange(len(last)), last]
            loss = distance + torch.nn.functional.cross_entropy(chosen, labels.clamp(min=0)[:, 3])
            return (loss, outputs) if return_outputs else loss

    trainer.__class__ = OwnLoss
    trainer.teacher = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.mul_(1.02)
    return trainer


class SeededSteps(TrainerCallback):
    """Callback that seeds each step."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


def own_history(kind, folder, case, accumulation) -> tuple[list[tuple[float, float]], np.ndarray, float]:
    """Train with a loss of the user, and evaluate: what `trained` returns, and the loss of the evaluation."""
    options = {
        "label smoothing": {"label_smoothing_factor": 0.1},
        "NEFTune": {"neftune_noise_alpha": 5.0},
    }.get(case, {})
    trainer = make_trainer(kind, folder, gradient_accumulation_steps=accumulation, max_steps=3, **options)
    if case == "compute_loss_func":
        trainer.compute_loss_func = mean_of_tokens
    if case == "NEFTune":
        trainer.add_callback(SeededSteps())  # samplers draw another number of times with several processes
    if case == "own loss with a teacher":
        with_own_loss(trainer)
        trainer.model_accepts_loss_kwargs = False
    return *trained(trainer), trainer.evaluate(samples(4))["eval_loss"]


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
@pytest.mark.parametrize("case", ["label smoothing", "NEFTune", "compute_loss_func", "own loss with a teacher"])
def test_losses_of_the_user_are_those_of_one_process(on_ranks, tmp_path, case, accumulation):
    [expected] = on_ranks(1, own_history, STOCK, tmp_path, case, accumulation)
    for size in (2,) if accumulation > 1 else (2, 3):
        for found in on_ranks(size, own_history, size, tmp_path, case, accumulation):
            check_training(found, expected)
            np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)


# NEFTune is left out, as two groups draw other noise.
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("label smoothing", marks=pytest.mark.exhaustive),
        pytest.param("compute_loss_func", marks=pytest.mark.exhaustive),
        "own loss with a teacher",
    ],
)
def test_losses_of_the_user_on_two_groups_are_those_of_two_processes(on_ranks, tmp_path, case, accumulation):
    expected = on_ranks(2, own_history, STOCK, tmp_path, case, accumulation)[0]
    for found in on_ranks(4, own_history, 2, tmp_path, case, accumulation):
        check_training(found, expected)
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)


def classification(kind, folder) -> tuple[list[tuple[float, float]], np.ndarray, dict[str, float], np.ndarray]:
    """Train a classifier of sequences with metrics of its own."""
    torch.manual_seed(0)
    config = tiny_config("qwen2", pad_token_id=0, num_labels=3)
    name = {} if kind == STOCK else {"attn_implementation": "context_parallel"}
    model = AutoModelForSequenceClassification.from_config(config, **name)

    def collate(rows):
        batch = padding_collator(rows)
        return {**batch, "labels": batch["input_ids"][:, 2] % 3}

    trainer = make_trainer(kind, folder, model=model, max_steps=3, eval_strategy="no")
    trainer.data_collator = collate
    trainer.compute_metrics = lambda found: {"accuracy": float((found.predictions == found.label_ids).mean())}
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    run = trained(trainer)
    metrics = trainer.evaluate(samples(7))
    return *run, {name: metrics[name] for name in ("eval_loss", "eval_accuracy")}, trainer.predict(samples(7))[0]


def test_a_classifier_and_its_metrics_are_those_of_one_process(on_ranks, tmp_path):
    [expected] = on_ranks(1, classification, STOCK, tmp_path)
    for found in on_ranks(3, classification, 3, tmp_path):
        check_training(found, expected)
        assert found[2] == pytest.approx(expected[2], rel=1e-5)
        np.testing.assert_array_equal(found[3], expected[3])


def loss_of_a_call(kind, folder) -> float:
    trainer = make_trainer(kind, folder)
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, padding_collator(samples(2))).item()


def test_compute_loss_of_a_whole_batch_is_that_of_one_process(on_ranks, tmp_path):
    [expected] = on_ranks(1, loss_of_a_call, STOCK, tmp_path)
    np.testing.assert_allclose(on_ranks(2, loss_of_a_call, 2, tmp_path), expected, rtol=1e-6)


def history_with_an_infinite_loss(kind, folder, settings) -> list[float]:
    trainer = make_trainer(kind, folder, settings=settings)

    class Overflowing(type(trainer)):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            infinite = self.state.global_step == 1
            return loss + float("inf") if infinite else loss  # the gradient is unchanged

    trainer.__class__ = Overflowing
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"dynamic": True, "max_tokens_per_rank": 64}], ids=["static", "dynamic"])
def test_an_infinite_loss_is_left_out_of_logs(on_ranks, tmp_path, settings):
    [expected] = on_ranks(1, history_with_an_infinite_loss, STOCK, tmp_path, None)
    assert expected[1] == 0
    for found in on_ranks(2, history_with_an_infinite_loss, 2, tmp_path, settings):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def evaluation(kind, folder, collator) -> tuple[float | None, np.ndarray, np.ndarray | None, float]:
    """Evaluate and predict 7 samples, which 2 groups do not share equally.

    Returns:
        The loss, predictions, labels, and the number of steps in which logs say that the samples were evaluated.
    """
    trainer = make_trainer(kind, folder, collator=collator)
    data = samples(7)
    loss = None if collator == "no labels" else trainer.evaluate(data)["eval_loss"]
    predictions = trainer.predict(data)
    speeds = [entry for entry in trainer.state.log_history if "eval_runtime" in entry] or [predictions.metrics]
    steps, rate = (next(x for name, x in speeds[0].items() if f"_{unit}_per" in name) for unit in ("steps", "samples"))
    return loss, predictions.predictions, predictions.label_ids, 7 * steps / rate


@pytest.mark.parametrize("collator", ["right", pytest.param("no labels", marks=pytest.mark.exhaustive)])
def test_evaluation_and_prediction_are_those_of_one_process(on_ranks, tmp_path, collator):
    [(loss, logits, labels, steps)] = on_ranks(1, evaluation, STOCK, tmp_path, collator)
    # Trainer weights the losses of data-parallel ranks by tokens, so the reference of two groups is two processes.
    loss_of_two = on_ranks(2, evaluation, STOCK, tmp_path, collator)[0][0]
    for ranks, size, expected_loss in ((2, 2, loss), (4, 2, loss_of_two), (3, 3, loss)):
        for found_loss, found_logits, found_labels, found_steps in on_ranks(
            ranks, evaluation, size, tmp_path, collator
        ):
            np.testing.assert_allclose(found_steps, np.ceil(round(steps) / (ranks // size)), rtol=0.05)
            if loss is not None:
                np.testing.assert_allclose(found_loss, expected_loss, rtol=1e-5)
            assert found_logits.shape == logits.shape
            np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-5)
            if labels is None:
                assert found_labels is None
            else:
                np.testing.assert_array_equal(found_labels, labels)


class Stream(IterableDataset):
    """Documents of unknown number."""

    def __iter__(self):
        return iter(samples(7))


def evaluation_of_a_stream(kind, folder) -> float:
    trainer = make_trainer(kind, folder)
    trainer.args.per_device_eval_batch_size = 2
    return trainer.evaluate(Stream())["eval_loss"]


def test_the_short_last_batch_of_a_stream_counts_as_on_one_process(on_ranks, tmp_path):
    [expected] = on_ranks(1, evaluation_of_a_stream, STOCK, tmp_path)
    np.testing.assert_allclose(on_ranks(2, evaluation_of_a_stream, 2, tmp_path), expected, rtol=1e-5)


def resumed(kind, folder, checkpoint) -> list[tuple[float, float]]:
    trainer = make_trainer(kind, folder, collator="packed", max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def train_and_save(kind, folder) -> list[tuple[float, float]]:
    options = {"collator": "packed", "save_strategy": "steps", "save_steps": 2}
    return history(kind, folder, options)


def steps_with_random_crops(size, folder, checkpoint) -> int:
    trainer = make_trainer(size, folder, save_strategy="steps", save_steps=2)
    trainer.data_collator = random_crops
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.global_step


def test_ranks_that_a_checkpoint_has_no_random_state_of_draw_as_their_group(on_ranks, tmp_path):
    assert on_ranks(2, steps_with_random_crops, 2, tmp_path / "saved", None) == [4, 4]
    checkpoint = str(tmp_path / "saved" / "checkpoint-2")
    assert on_ranks(4, steps_with_random_crops, 4, tmp_path / "resumed", checkpoint) == [4] * 4


def test_a_checkpoint_is_ordinary_and_resumes_at_another_size(on_ranks, tmp_path):
    [expected, _] = on_ranks(2, train_and_save, 2, tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert "context_parallel" not in Path(checkpoint, "config.json").read_text()
    for ranks in (1, 4):
        for found in on_ranks(ranks, resumed, ranks, tmp_path, checkpoint):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def lora_history(kind, folder, autocast) -> list[tuple[float, float]]:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama", None if kind == STOCK else "context_parallel", torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return history(kind, folder, {"model": model, "bf16": autocast})


def test_lora_is_exact(on_ranks, tmp_path):
    [expected] = on_ranks(1, lora_history, STOCK, tmp_path, False)
    for found in on_ranks(2, lora_history, 2, tmp_path, False):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class BytesOnTheWire(TrainerCallback):
    """Callback that collects the dtypes of the messages of a run."""

    def __init__(self):
        self.dtypes = set()

    def on_train_begin(self, args, state, control, **kwargs):
        post = self.trainer.cp.exchange.post

        def noting(sends, receives):
            self.dtypes |= {str(tensor.dtype) for _, tensor in (*sends, *receives)}
            return post(sends, receives)

        self.trainer.cp.exchange.post = noting


def autocast_history(folder) -> tuple[list[tuple[float, float]], set[str]]:
    trainer = make_trainer(2, folder, model_type="qwen3", bf16=True)
    wire = BytesOnTheWire()
    wire.trainer = trainer
    trainer.add_callback(wire)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry], wire.dtypes


def test_autocast_sends_bfloat16(on_ranks, tmp_path):
    [expected] = on_ranks(1, history, STOCK, tmp_path, {"model_type": "qwen3", "bf16": True})
    for found, dtypes in on_ranks(2, autocast_history, tmp_path):
        assert dtypes == {"torch.bfloat16", "torch.float32"}  # bfloat16 keys, and float32 sums of their gradients
        np.testing.assert_allclose(found, expected, rtol=3e-2)
