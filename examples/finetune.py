"""Fine-tune a causal language model on long text files, with each sequence split over all processes.

    accelerate launch --multi_gpu --num_processes 2 examples/finetune.py --model Qwen/Qwen3-0.6B --files book.txt

Without GPUs, add `--cpu`.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import hf_context_parallel as hcp

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a hub id or a folder")
parser.add_argument("--files", required=True, nargs="+", help="text files, each of which is one document")
parser.add_argument("--max-length", type=int, default=32768, help="most tokens of a sequence")
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--output-dir", default="output/finetune")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

args = TrainingArguments(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    per_device_train_batch_size=1,
    gradient_checkpointing=True,
    learning_rate=1e-5,
    logging_steps=1,
    use_cpu=options.cpu,
)

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="context_parallel")


def tokenize(batch):
    ids = tokenizer(batch["text"], truncation=True, max_length=options.max_length)["input_ids"]
    return {"input_ids": ids, "labels": ids}


documents = load_dataset("text", data_files=options.files, sample_by="document", split="train")

trainer = hcp.ContextParallelTrainer(
    model=model,
    args=args,
    train_dataset=documents.map(tokenize, batched=True, remove_columns=["text"]),
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # an ordinary collator, which makes whole batches
    processing_class=tokenizer,
    context_parallel=hcp.ContextParallelConfig(size=args.world_size),
)
trainer.train()
trainer.save_model()
