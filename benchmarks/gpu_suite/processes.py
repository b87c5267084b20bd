"""Checks with two processes on one GPU, over gloo: real ranks with autograd's threads, DDP, checkpointing, Trainer.

NCCL refuses two ranks on one device, so messages are staged through the host.
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from multiprocessing import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hf_context_parallel as hcp
from hf_context_parallel.verification.types.tiny import VOCABULARY, tiny_config, tiny_model

from .models import difference, whole_step

RANKS = 2
EXACT = 1e-4
"""Largest relative error of loss or gradients in float32."""
TYPES = ("qwen3", "gpt_oss", "gemma3_text", "qwen3_next")
CASES = [*((name, "p2p") for name in TYPES), *((name, "a2a") for name in TYPES), ("qwen3", "all_gather")]


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    return on_ranks(compared, options.device)


Tell = Callable[[dict[str, Any]], None]
"""Function that takes a result."""


def on_ranks(work: Callable[[str, str, Tell], None], device: str) -> Iterator[dict[str, Any]]:
    """Call `work` with a folder, the device and a `Tell` on two ranks, and yield the results of both as they come."""
    start = "spawn" if device == "cuda" else "fork"  # a fork has imported all, and could not use CUDA
    results = torch.multiprocessing.get_context(start).SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.start_processes(
            rank_of, (work, folder, device, results), RANKS, join=False, start_method=start
        )
        ended = False
        while not ended:
            ended = ranks.join(timeout=1)
            while not results.empty():
                yield results.get()


def rank_of(rank: int, work: Callable[[str, str, Tell], None], folder: str, device: str, results: SimpleQueue) -> None:
    """Run the work of one rank."""
    environment = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": RANKS}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_577}
    os.environ |= {name: str(value) for name, value in environment.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    if device == "cpu":
        torch.set_num_threads(1)
    work(folder, device, lambda result: results.put({**result, "what": f"rank {rank}, {result['what']}"}))
    dist.barrier()
    dist.destroy_process_group()


def compared(folder: str, device: str, tell: Tell) -> None:
    """Run the comparisons of one rank."""
    for model_type, comm_type in CASES[:1] if device == "cpu" else CASES:
        tell(model_on_ranks(model_type, comm_type, torch.device(device)))
    tell(trained(folder, device))


def model_on_ranks(model_type: str, comm_type: str, device: torch.device) -> dict[str, Any]:
    """Compare a checkpointed step under DDP in float32 with the same model on the whole batch in one process."""
    config = tiny_config(model_type)
    input_ids = torch.randint(3, VOCABULARY, (2, 151), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": input_ids, "labels": input_ids}
    truth = tiny_model(config, None, torch.float32).to(device)
    expected = whole_step(truth, batch)
    model = tiny_model(config, "context_parallel", torch.float32).to(device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kernel = "reference" if device.type == "cuda" else "auto"
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=RANKS, comm_type=comm_type, kernel=kernel))
    wrapped = DistributedDataParallel(model, find_unused_parameters=model_type == "gpt_oss")
    try:
        with cp.shard(batch, wrapped) as local:
            loss = wrapped(**local).loss
            (loss * cp.size).backward()
    except ValueError as refusal:
        return {"what": f"{model_type}, {comm_type}, refused", "message": str(refusal)[:200]}
    total = loss.detach().clone()
    dist.all_reduce(total)
    error = difference(model, total, truth, expected)
    return {"what": f"{model_type}, {comm_type}", "right": error <= EXACT, "error": error}


def trained(folder: str, device: str) -> dict[str, Any]:
    """Compare three steps of the Trainer on both ranks with the same steps of a plain loop on one rank."""
    from transformers import DataCollatorForLanguageModeling, TrainingArguments

    class Tokens(DataCollatorForLanguageModeling):
        def __call__(self, rows, return_tensors=None):
            ids = torch.tensor([row["input_ids"] for row in rows])
            return {"input_ids": ids, "labels": ids.clone()}

    rows = torch.randint(3, VOCABULARY, (3, 97), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = TrainingArguments(
        f"{folder}/trained",
        max_steps=3,
        per_device_train_batch_size=1,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        report_to=[],
        ddp_backend="gloo",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        save_strategy="no",
        seed=3,
    )
    config = tiny_config("qwen3")
    kernel = "reference" if device == "cuda" else "auto"
    trainer = hcp.ContextParallelTrainer(
        model=tiny_model(config, "context_parallel", torch.float32),
        args=arguments,
        train_dataset=[{"input_ids": rows[0]}] * 3,  # the same in each step, in any order
        data_collator=Tokens(tokenizer=None, mlm=False),
        context_parallel=hcp.ContextParallelConfig(size=RANKS, kernel=kernel),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    alone = tiny_model(config, None, torch.float32).to(device).train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=1e-2)
    ids = torch.tensor([rows[0]], device=device)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        expected.append(whole_step(alone, {"input_ids": ids, "labels": ids}).item())
        optimizer.step()
    loss_error = max(abs(a / b - 1) for a, b in zip(losses, expected))
    pairs = zip(trainer.model.parameters(), alone.parameters())
    weights = max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)
    right = len(losses) == 3 and loss_error < EXACT and weights < EXACT
    return {"what": "Trainer", "right": right, "loss error": loss_error, "weight error": weights}
