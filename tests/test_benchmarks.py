"""Runs of the benchmarks on small sizes. Their counts are checked, their times are not."""

import gzip
import importlib
import json

import pytest
import torch

pytestmark = pytest.mark.distributed


@pytest.fixture
def run(tmp_path, capsys):
    """Run a benchmark, and return the numbers that it writes into `tmp_path`."""

    def run(name: str, *arguments: str) -> dict:
        status = importlib.import_module(f"benchmarks.{name}").main(["--output", str(tmp_path), *arguments])
        assert status == 0
        assert (tmp_path / f"{name}.md").read_text() in capsys.readouterr().out
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


@pytest.mark.exhaustive
def test_towers(run):
    results = run("towers", "--rounds", "1", "--images", "3", "--layers", "1")
    assert set(results["seconds"]) == {"whole", "shared"}
    assert max(results["shares"].values()) < 1


@pytest.mark.exhaustive
def test_border(run):
    results = run("border", "--tokens", "64", "--rounds", "2", "--memory-tokens", "512")
    assert results["peak_mib"]["prepared"] < results["peak_mib"]["stock"]
    assert set(results["seconds"]) == {"stock", "prepared"}


@pytest.mark.exhaustive
def test_memory(run, tmp_path):
    """Assert that the numbers are there, and that lengths which need little are not far off."""
    small = ("--ranks", "1,2", "--tokens", "512,1024", "--budget", "64", "--tries", "2", "--time-tokens", "128")
    results = run("memory", *small, "--rounds", "2", "--heads-tokens", "512")
    assert (tmp_path / "memory.png").stat().st_size
    assert {x["ranks"] for x in results["peaks"]} == {x["ranks"] for x in results["longest"]} == {1, 2}
    assert all(x["bytes"] == pytest.approx(x["counted"], rel=0.1) for x in results["peaks"])
    assert all(0.9 * x["counted"] <= x["tokens"] + 1 <= 1.1 * x["counted"] for x in results["longest"])
    lengths = [x["tokens"] for x in results["projected"]]
    assert lengths[-1] == max(lengths)  # with all options
    rings = [(x["tokens"], int(ranks), tokens) for x in results["projected"] for ranks, tokens in x["groups"].items()]
    assert all(tokens >= 0.95 * ranks * one for one, ranks, tokens in rings)


@pytest.mark.exhaustive
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
        assert {"ideal", "share", "p2p", "all_gather", "a2a", "one process"} <= set(result["seconds"])
        assert result["auto"] in result["seconds"]
        assert all(len(seconds) == 2 for seconds in result["seconds"].values())


def test_traffic(run, tmp_path):
    results = run("traffic", "--ranks", "2,3,16", "--tokens", "64")["results"]
    assert (tmp_path / "traffic.png").stat().st_size
    for by_ranks in results.values():
        for ways in by_ranks.values():
            # A plan sends the bytes that are needed, which are counted here without a plan. For a single document
            # these are the bytes of a trimmed ring.
            assert ways["ours"]["keys"] == ways["ours"]["gradients"] == 1
            assert ways["ours"]["keys_between"] <= ways["owner to readers"]["keys_between"]
    assert all(ways["ours"] == ways["trimmed ring"] for ways in results["one document"].values())


def test_plan(run, tmp_path):
    results = run("plan", "--ranks", "2,4,64", "--tokens", "1K,16K")["results"]
    assert (tmp_path / "plan.png").stat().st_size
    for name, by_tokens in results.items():
        assert {tokens: list(by_ranks) for tokens, by_ranks in by_tokens.items()} == {
            "1024": ["2", "4"],
            "16384": ["2", "4", "64"],
        }
        for ways in (ways for by_ranks in by_tokens.values() for ways in by_ranks.values()):
            taken = {way: result for way, result in ways.items() if result}
            assert all(0 < result["efficiency"] <= 1 <= result["work"] + 1e-9 for result in taken.values())
            best = max(ways[way]["efficiency"] for way in ("p2p", "all_gather", "a2a", "a2a+p2p") if ways[way])
            assert ways["auto"]["efficiency"] == best
            assert (ways["zigzag by document"] is None) == name.startswith("a window")
        assert by_tokens["16384"]["64"]["Ulysses"] is None  # more ranks than heads
    one = results["one document"]["16384"]["4"]
    token = 8 * 2 * 128  # numbers in the keys and values of a token
    assert one["p2p"]["megabytes"] == pytest.approx(16384 / 8 * token * 4.5 * (2 + 2 + 4) / 1e6)  # 4.5 chunks
    assert one["zigzag by document"]["megabytes"] == pytest.approx(4096 * token * (3 * (2 + 2) + 4 * 4) / 1e6)


@pytest.mark.exhaustive
def test_mixers(run):
    results = run("mixers", "--tokens", "24", "--rounds", "1")["results"]
    assert len(results) == 3
    for result in results:
        assert set(result["seconds"]) == {"one process", "whole sequences", "native", "halves"}


@pytest.mark.exhaustive
def test_trace(run, tmp_path):
    sizes = ("--ranks", "2", "--tokens", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--rounds", "1")
    results = run("trace", *sizes, "--traces", str(tmp_path / "traces"))["bars"]
    assert (tmp_path / "trace.png").stat().st_size
    assert sorted(path.name for path in (tmp_path / "traces").glob("p2p*.gz")) == [
        "p2p_rank0.json.gz",
        "p2p_rank1.json.gz",
    ]
    ways = {}
    for comm_type, by_rank in results.items():
        assert len(by_rank) == 2 and all(start <= end for drawn in by_rank for *_, start, end in drawn)
        ways[comm_type] = [{(way, kind, label) for way, _, kind, label, _, _ in drawn if label} for drawn in by_rank]
    kernels = {(way, "kernels", step) for way in ("forward", "backward") for step in "01"}
    keys = {("forward", "keys", "1"), ("backward", "keys", "1"), ("backward", "gradients", "1")}
    assert ways["p2p"] == [kernels | keys] * 2
    assert ways["all_gather"] == [{(*rest, step) for *rest, step in kernels if step == "1"} | keys] * 2
    heads = {(way, "heads", what) for way in ("forward", "backward") for what in ("to heads", "to tokens")}
    assert ways["a2a"] == ways["a2a+p2p"] == [{(*rest, step) for *rest, step in kernels if step == "0"} | heads] * 2


def test_a_devices_ranges_are_of_the_round_in_which_they_were_queued(run, tmp_path):
    """Assert it also for ranges that begin on the device before all ranges queued in their round."""

    def event(category, name, start):
        return {"cat": category, "name": f"cp/{name}", "ts": start, "dur": 5}

    events = [event("user_annotation", f"round/{number}", 100 * number) for number in range(2)]
    events += [event("user_annotation", "forward/step0/compute", 1), event("gpu_user_annotation", "round/0", 30)]
    events += [event("gpu_user_annotation", "forward/step0/compute", start) for start in (20, 120)]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    rounds = importlib.import_module("benchmarks.trace").read_rounds(tmp_path / "trace.json.gz", "cuda")
    assert rounds == {n: [("forward", 0, "compute", 100 * n + 20, 100 * n + 25)] for n in range(2)}


@pytest.mark.parametrize(
    "left_out",
    [
        # They are the longest, and of what other tests run on a CPU: compiled models, rings and whole models.
        {"compiled", "models", "rings"},
        pytest.param(set(), marks=pytest.mark.exhaustive),
    ],
    ids=["shorter items", "all items"],
)
def test_gpu_suite_on_the_cpu(tmp_path, left_out):
    suite = importlib.import_module("benchmarks.gpu_suite.__main__")
    items = ",".join(name for name in suite.ITEMS if name not in left_out)
    assert suite.main(["--device", "cpu", "--items", items, "--output", str(tmp_path)]) == 0
    results = [json.loads(line) for line in (tmp_path / "gpu_suite.jsonl").read_text().splitlines()]
    assert sum(result["item"] == "races" and result["right"] for result in results) == 8
    assert {result["item"] for result in results} == set(suite.ITEMS) - left_out - {"nccl", "flash_attn_4"}
    assert len(list(tmp_path.iterdir())) <= 8
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "What failed" not in page and page.rstrip().splitlines()[-1].startswith("| flash_attn_4 | 1 of 1 |")


def test_gpu_suite_keeps_what_an_item_found_before_it_failed(tmp_path, monkeypatch):
    suite = importlib.import_module("benchmarks.gpu_suite.__main__")
    monkeypatch.setitem(suite.ITEMS, "races", suite.Seconds(0.1, 0.1))
    monkeypatch.setattr(suite, "SLOWER", 1)
    assert suite.main(["--device", "cpu", "--items", "races", "--output", str(tmp_path)]) == 1
    assert "**WRONG** ended: status stopped after 0.1 s" in (tmp_path / "gpu_suite.md").read_text()


def test_gpu_suite_starts_no_item_for_which_no_time_is_left(tmp_path, monkeypatch):
    suite = importlib.import_module("benchmarks.gpu_suite.__main__")
    monkeypatch.setattr(suite, "TOTAL", 1)
    assert suite.main(["--device", "cpu", "--items", "races,facts", "--output", str(tmp_path)]) == 1
    page = (tmp_path / "gpu_suite.md").read_text()
    assert "0 of 2 checks passed" in page and page.count("**WRONG** not started") == 4


def test_the_items_of_the_gpu_suite_fit_into_its_time():
    suite = importlib.import_module("benchmarks.gpu_suite.__main__")
    beside, alone = (sum(x.expected for x in items.values()) for items in (suite.BESIDE, suite.ALONE))
    assert beside / suite.AT_ONCE + alone <= suite.TOTAL


def test_gpu_suite_counts_messages_beside_no_kernel():
    overlap = importlib.import_module("benchmarks.gpu_suite.overlap").overlap

    def event(kind, stream, start, end):
        return {"cat": kind, "args": {"stream": stream}, "ts": start, "dur": end - start}

    kernels = [event("kernel", 7, 0, 500), event("kernel", 7, 510, 1000), event("gpu_memcpy", 7, 0, 900)]
    found = overlap([*kernels, event("gpu_memcpy", 14, 490, 508)])
    assert found["right"] and (found["shown"], found["copies"]) == (pytest.approx(0.008), 1)
    assert found["idle"] == pytest.approx(0.01)
    assert not overlap([*kernels[:1], event("kernel", 7, 600, 1000), event("gpu_memcpy", 14, 500, 590)])["right"]
    assert not overlap(kernels)["right"]  # nothing was sent


@pytest.mark.parametrize(
    ("report", "status", "errors"),
    [("ERROR SUMMARY: 0 errors", 0, 0), ("Invalid read\nERROR SUMMARY: 1 error", 0, 1), ("no such device", 1, None)],
)
def test_gpu_suite_judges_the_report_of_compute_sanitizer(report, status, errors):
    result = importlib.import_module("benchmarks.gpu_suite.sanitizer").judged(report, status)
    assert (result["errors"], result["right"]) == (errors, errors == 0)
    assert result["right"] or result["report"] == report


def test_gpu_suite_finds_compute_sanitizer_beside_cuda(tmp_path, monkeypatch):
    sanitizer = importlib.import_module("benchmarks.gpu_suite.sanitizer")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(0o755)
    assert sanitizer.found() == tool


def test_gpu_suite_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module("benchmarks.gpu_suite.__main__").main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_dynamic(run, tmp_path):
    small = ("--batches", "1", "--rounds", "1", "--scale", "64", "--samples", "2", "--steps", "1")
    results = run("dynamic", "--ranks", "8,64", "--most", "4096", *small)
    assert (tmp_path / "dynamic.png").stat().st_size
    assert [[len(times) for times in taken.values()] for taken in results["seconds"]] == [[1, 1]]
    for setting, ways in results["counted"].items():
        static, dynamic = ways["one by one"], ways["dynamic"]
        assert dynamic["last"] <= static["last"] and sum(dynamic["idle"]) < sum(static["idle"])
        if setting == "weights sharded over a node":
            assert all(ours < other for ours, other in zip(dynamic["idle"], static["idle"]))
    assert [result["ranks"] for result in results["simulated"]] == [8, 64]
    for result in results["simulated"]:
        assert all(all(ways.values()) for ways in result["never_slower"].values())
        for rates in result["tokens_per_second"].values():
            assert rates["ours"] <= rates["most"]


@pytest.mark.exhaustive
def test_drills(run):
    """Assert that runs which were killed in each phase, with each way to hold weights, resume to the same bits."""
    found = run("drills", "--kills", "1", "--others", "1")["drills"]
    assert {(x["layout"], x["family"]) for x in found} == {
        ("CP 2", "DDP"),
        ("DP 2 x CP 2", "DDP"),
        ("CP 2", "FSDP2"),
        ("CP 2", "LoRA"),
    }
    assert all(x["same"] == x["kills"] == 1 for x in found)


@pytest.mark.exhaustive
def test_soak(run):
    """Assert that random steps equal one process, and that closed objects leave nothing."""
    found = run("soak", "--steps", "60")
    assert len(found["steps"]) == 61 and not found["faults"]
