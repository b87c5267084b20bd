"""Tests of the reports of runs."""

from hf_context_parallel.recipe.report import write_report


def test_the_report_has_a_table_and_curves(tmp_path):
    history = [
        {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 100.0, "peak_memory_gib": 0.5},
        {"step": 2, "loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 300.0, "peak_memory_gib": 0.75},
        {"step": 2, "eval_loss": 1.25},
        {"step": 2, "train_runtime": 3.0},
    ]
    text = write_report(tmp_path / "new", "Run of a recipe", history).read_text()
    assert "2 steps; loss 2.5000 at the first log line and 1.5000 at the last; 200 tokens/s (median)" in text
    assert "at most 0.75 GiB a rank" in text
    assert text.count("\n|") == 5  # a heading, a rule and three steps
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")
