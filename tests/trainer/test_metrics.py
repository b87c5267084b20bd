"""Tests of the figures that the Trainer logs."""

from __future__ import annotations

import json

import pytest

from tests.helpers.trainer import STOCK, make_trainer


def logged(folder) -> tuple[list[dict], int, float]:
    trainer = make_trainer(2, folder, collator="packed", include_num_input_tokens_seen="all")
    read = trainer._watch.read
    trainer._watch.read = lambda: (2.0, read()[1])  # seconds between two logs
    trainer.train()
    return trainer.state.log_history, trainer.state.num_input_tokens_seen, trainer.state.total_flos


def logged_by_stock(folder) -> tuple[int, float]:
    trainer = make_trainer(STOCK, folder, collator="packed", include_num_input_tokens_seen="all")
    trainer.train()
    return trainer.state.num_input_tokens_seen, trainer.state.total_flos


def test_logs_have_throughput_length_and_memory_and_counts_are_those_of_one_process(on_ranks, tmp_path):
    [(entries, seen, flos), _] = on_ranks(2, logged, tmp_path)
    for entry in entries[:4]:
        assert entry["tokens_per_second"] == pytest.approx(2 * entry["tokens_per_second_per_rank"])
        assert entry["sequence_length"] > 9
        assert entry["peak_memory_gib"] >= 0
        json.dumps(entry)
    assert sum(2.0 * entry["tokens_per_second"] for entry in entries[:4]) == seen
    assert [(seen, flos)] == on_ranks(1, logged_by_stock, tmp_path)
