"""Command `hf-context-parallel`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_context_parallel.recipe.compare import compare_with_one_process
from hf_context_parallel.recipe.errors import RecipeError
from hf_context_parallel.recipe.launch import launch, trusted
from hf_context_parallel.recipe.preflight import check_recipe
from hf_context_parallel.recipe.reading import load_recipe

INTERRUPTED = 130
"""Exit status of typer after Ctrl-C."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="such as recipes/demo_cpu.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[OVERRIDES]", help="such as training.max_steps=3")]
Processes = Annotated[
    int | None, typer.Option(min=1, help="processes to start; by default as many as the recipe needs")
]


@app.callback()
def root() -> None:
    """Context parallelism for Hugging Face Transformers."""


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    nproc: Processes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="one step of a tiny model, offline, on one process")
    ] = False,
) -> None:
    """Fine-tune the model of RECIPE on this machine, through accelerate's launcher."""
    # The recipe is read and checked here too, so that a mistake is reported once, before any process starts.
    loaded = load_recipe(recipe, overrides or [])
    processes = nproc or (1 if dry_run else loaded.processes)
    check_recipe(loaded, processes, dry_run)
    arguments = [str(recipe), *(overrides or []), *(["--dry-run"] if dry_run else [])]
    sys.exit(launch(processes, arguments))


@app.command()
def compare(recipe: RecipePath, overrides: Overrides = None, nproc: Processes = None) -> None:
    """Run RECIPE on several ranks and on one process, and print their steps side by side."""
    sys.exit(compare_with_one_process(recipe, overrides or [], nproc))


@app.command()
def check(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL_OR_TYPE]", help="a model type, a folder, or a model of the hub")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="every language model of Transformers")] = False,
    ranks: Annotated[str | None, typer.Option(help="sizes of the groups to compare; 2,3,4 by default")] = None,
    comm: Annotated[str, typer.Option(help="how keys and values travel")] = "p2p",
    tp: Annotated[
        int,
        typer.Option(min=1, help="ranks of tensor parallelism, beside CP groups of 2"),
    ] = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="models to check at a time")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="with --all: write the results into the package and its docs")
    ] = False,
    module: Annotated[
        str | None, typer.Option("--import", metavar="MODULE", help="a module that registers a model of your own")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code that comes with MODEL_OR_TYPE")
    ] = False,
    vlm: Annotated[
        bool, typer.Option("--vlm", help="with images, video and sound; with --all: every type that takes them")
    ] = False,
    trainers: Annotated[
        bool, typer.Option("--trainers", help="training runs in place of models; MODEL_OR_TYPE is a part of a name")
    ] = False,
) -> None:
    """Compare a tiny model of MODEL_OR_TYPE on shards with the same model on one process.

    The weights are random. For a model of the hub, only its configuration is read. A model that is found exact is
    admitted from then on, whatever its sizes.
    """
    if trainers:
        from hf_context_parallel.verification.trainers.command import run_check_trainers

        sys.exit(run_check_trainers([model] if model else [], write))
    from hf_context_parallel.verification.types.command import run_check

    if module is not None:
        sys.path.insert(0, os.getcwd())  # where `python -m` would look for it
    if trust_remote_code:
        print(trusted(model))
    sys.exit(run_check(model, every, ranks, comm, jobs, write, tp, trust_remote_code, module, vlm))


@app.command()
def plan(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="a recipe to plan, in place of --model")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="ID_OR_CONFIG", help="a model of the hub, a folder, or a config.json")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="tokens of a sequence")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="number of GPUs; 1, or as many as RECIPE starts")] = None,
    gpu: Annotated[str | None, typer.Option(help="such as h100-80gb; by default the one of this machine")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="rank of adapters of all linear layers")] = None,
    tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="tokens of an optimizer step; by default one run of every group")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="sequences that a CP group computes at a time")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="dtype of weights, gradients and optimizer; bfloat16 with --lora, else float32"),
    ] = None,
    image_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="share of tokens that are of images; 1 for a model with a vision tower"),
    ] = None,
    node: Annotated[int, typer.Option(min=1, help="GPUs of a node")] = 8,
    network: Annotated[float, typer.Option(min=0.001, help="GB/s that a GPU sends to other nodes")] = 50.0,
    longest: Annotated[bool, typer.Option("--longest", help="how long sequences can be")] = False,
    megatron_table: Annotated[
        bool, typer.Option("--megatron-table", help="TP and CP on 8 GPUs, beside figures of Megatron-LM")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="list all plans that fit")] = False,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="write the recipe of the first plan")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code that comes with the model")
    ] = False,
) -> None:
    """List the meshes on which a model fits: memory by part, messages, and the estimated speed, best first.

    No GPU is needed. For a model of the hub, only its configuration is read.
    """
    from hf_context_parallel.sizing.command import Asked, run_plan

    if trust_remote_code:
        print(trusted(model))
    asked = Asked(
        model=model,
        length=seq_len,
        gpus=gpus,
        gpu=gpu,
        lora=lora,
        tokens=tokens_per_batch,
        rows=rows,
        weights=weights,
        images=image_share,
        node=node,
        network=network,
        trust_remote_code=trust_remote_code,
    )
    sys.exit(run_plan(asked, recipe, write, longest, megatron_table, every))


@app.command()
def calibrate(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where PyTorch sees a GPU")] = None,
) -> None:
    """Measure the rates of this machine, by which comm_type="auto" estimates. It takes less than a minute.

    Measured are attention by each kernel, matrix products, memory, launches, and messages between two processes. The
    rates are kept in the cache of the user for this device and this version of PyTorch.
    """
    from hf_context_parallel.calibration.command import run_calibrate

    sys.exit(run_calibrate(device))


def main() -> None:
    """Run the command. An error of a recipe is printed without a traceback."""
    try:
        app()
    except RecipeError as error:
        sys.exit(str(error))
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # so that a loop of a shell around the command ends too
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        raise
