"""Data that leaves the Trainer nothing to learn, and labels that do not fit their tokens."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    TrainingArguments,
    default_data_collator,
)

from hf_context_parallel import ContextParallelConfig, ContextParallelTrainer
from tests.helpers.models import tiny_model

GOOD = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 40
IGNORED = [{"input_ids": [5, 6, 7, 8], "labels": [5, -100, -100, -100]}] * 40
SHORT = [*GOOD[:1], {"input_ids": [5, 6, 7, 8], "labels": [5, 6]}] * 4
LONG = [*GOOD[:1], {"input_ids": [5, 6], "labels": [5, 6, 7, 8]}] * 4


class Nothing(torch.utils.data.IterableDataset):
    """Stream without a sample."""

    def __iter__(self):
        return iter(())


def masked(samples):
    """Collate, and mask all labels."""
    batch = default_data_collator(samples)
    batch["labels"][:] = -100
    return batch


def masked_at_first(samples, calls=[]):  # noqa: B006
    """Collate, and mask all labels of the first batch."""
    calls.append(samples)
    return masked(samples) if len(calls) == 1 else default_data_collator(samples)


def train(folder, data, collator=default_data_collator, steps=2, loss=None, rows=2, settings=None):
    args = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=steps,
        logging_steps=4,
        per_device_train_batch_size=rows,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = tiny_model("llama", "context_parallel")
    trainer = ContextParallelTrainer(model, args, collator, data, compute_loss_func=loss, context_parallel=settings)
    trainer.train()
    return trainer.state.global_step


@pytest.mark.parametrize("as_table", [False, True])
@pytest.mark.parametrize(
    ("data", "collator", "said"),
    [
        (IGNORED, default_data_collator, "all labels of the 40 samples of the data set are -100"),
        (
            SHORT,
            DataCollatorForSeq2Seq(ByT5Tokenizer()),
            "sample 1 of the data set has 4 input_ids and 2 labels, and 4",
        ),
        (LONG, DataCollatorWithFlattening(), "sample 1 of the data set has 2 input_ids and 4 labels, and 4 of 8"),
    ],
)
def test_data_that_cannot_be_learnt_is_refused_before_the_first_step(tmp_path, data, collator, said, as_table):
    with pytest.raises(ValueError, match=said):
        train(tmp_path, Dataset.from_list(data) if as_table else data, collator)


@pytest.mark.parametrize(
    ("steps", "nan_steps", "first"), [(2, 3, 2), (20, 3, 4), pytest.param(20, None, 12, marks=pytest.mark.exhaustive)]
)
def test_training_ends_if_no_step_has_a_target(tmp_path, steps, nan_steps, first, caplog):
    """The loss of a step without a target is NaN, which is read one step late."""
    with pytest.raises(ValueError, match=f"none of the first {first} steps had a target on any rank"):
        train(tmp_path, GOOD, masked, steps, settings=ContextParallelConfig(nan_steps=nan_steps))
    assert "Step 1 and the 0 before it had no target" in caplog.text


def test_a_batch_without_a_target_among_others_is_legal(tmp_path):
    assert train(tmp_path, GOOD, masked_at_first, 2) == 2


def test_a_stream_without_a_sample_is_refused(tmp_path):
    with pytest.raises(ValueError, match="training ended after 0 steps, because the data set has given no batch"):
        train(tmp_path, Nothing())


def test_short_labels_before_the_default_collator_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sample 1 of the data set has 4 input_ids and 2 labels"):
        train(tmp_path, SHORT)


@pytest.mark.parametrize("kind", ["masked", "made by the collator", "of rows"])
def test_labels_of_a_loss_or_a_collator_of_the_user_are_theirs(tmp_path, kind, caplog):
    """Assert that labels train which the model's own loss could not learn from."""
    if kind == "masked":
        data, options = IGNORED, {"loss": lambda outputs, labels, **_: outputs.logits.float().mean()}
    elif kind == "of rows":
        data = [{"input_ids": [5, 6, 7, 8], "labels": 3}] * 40
        options = {"loss": lambda outputs, labels, **_: outputs.logits[:, -1, labels].float().mean(), "rows": 1}
    else:
        data = [{"input_ids": [5, 6, 7, 8], "labels": [5]}] * 40
        options = {"collator": DataCollatorForLanguageModeling(ByT5Tokenizer(), mlm=False), "rows": 1}
    assert train(tmp_path, data, steps=12, **options) == 12
    assert "no target" not in caplog.text


def test_a_batch_that_is_a_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the batch is a list, and it must be a dict of tensors"):
        train(tmp_path, GOOD, lambda samples: list(samples))
