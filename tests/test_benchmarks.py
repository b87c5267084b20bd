"""The benchmarks run, and what they count is right. What they time is not looked at."""

import importlib
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a benchmark and returns the numbers that it writes into `tmp_path`."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])

    def run(name: str, *arguments: str) -> dict:
        status = importlib.import_module(f"benchmarks.{name}").main(["--output", str(tmp_path), *arguments])
        assert status == 0
        assert (tmp_path / f"{name}.md").read_text() in capsys.readouterr().out
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_attention(run):
    sizes = ("--ranks", "2", "--tokens", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16")
    results = run("attention", *sizes, "--packed", "96", "--dtypes", "float32,bfloat16", "--rounds", "2")["results"]
    alone, packed = results[:2], results[2:]
    assert [result["case"]["dtype"] for result in alone] == ["float32", "bfloat16"]
    assert {result["case"]["batch"] for result in packed} == {
        "four documents",
        "long tail",
        "tiny documents",
        "window",
    }
    for result in results:
        assert {"ideal", "p2p", "all_gather", "a2a", "one process"} <= set(result["seconds"])
        assert result["auto"] in result["seconds"]
        assert all(len(seconds) == 2 for seconds in result["seconds"].values())


def test_traffic(run, tmp_path):
    results = run("traffic", "--ranks", "2,3,16", "--tokens", "64")["results"]
    assert (tmp_path / "traffic.png").stat().st_size
    for by_ranks in results.values():
        for ways in by_ranks.values():
            # What a plan sends is the need, counted here without a plan, and a lone document's is a trimmed ring's.
            assert ways["ours"]["keys"] == ways["ours"]["gradients"] == 1
            assert ways["ours"]["keys_between"] <= ways["owner to readers"]["keys_between"]
    assert all(ways["ours"] == ways["trimmed ring"] for ways in results["one document"].values())


def test_mixers(run):
    results = run("mixers", "--tokens", "24", "--rounds", "1")["results"]
    assert len(results) == 3
    for result in results:
        assert set(result["seconds"]) == {"one process", "whole sequences", "native", "halves"}


def test_gpu_on_the_cpu(run):
    sizes = ("--parity-tokens", "61", "--tokens", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16")
    results = run("gpu", "--device", "cpu", "--dtypes", "bfloat16", *sizes, "--repeats", "1")
    assert len(results["parity"]) == 9
    assert [result["run"] for result in results["speed"]] == ["one call", *(f"rank {rank}" for rank in range(4))]


def test_gpu_says_that_there_is_none(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module("benchmarks.gpu").main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
