"""Fine-tune a causal language model in a plain loop of Accelerate, with each sequence split over two processes.

    accelerate launch --multi_gpu --num_processes 4 examples/accelerate_loop.py --model Qwen/Qwen3-0.6B --files *.txt

It makes one pass over the files, and saves nothing. Without GPUs, add `--cpu`.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import hf_context_parallel as hcp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a hub id or a folder")
parser.add_argument("--files", required=True, nargs="+", help="text files, each of which is one document")
parser.add_argument("--max-length", type=int, default=32768, help="most tokens of a sequence")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

set_seed(0)
accelerator = Accelerator(cpu=options.cpu, gradient_accumulation_steps=2)
cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="context_parallel")

texts = [Path(file).read_text() for file in options.files]
documents = tokenizer(texts, truncation=True, max_length=options.max_length)["input_ids"]
samples = [{"input_ids": ids, "labels": ids} for ids in documents]
loader = DataLoader(samples, batch_size=1, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

loader = cp.prepare_data_loader(loader, accelerator)  # each group of two processes reads samples of its own
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5))
hcp.parallelize(model, cp)  # whole batches in, whole outputs out

model.train()
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses = accelerator.gather_for_metrics(loss.detach()[None])  # one of each sample
    accelerator.print(f"loss {losses.mean():.4f}")
