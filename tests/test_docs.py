"""Tests of every code block in the documentation: Python is run, commands are parsed, recipes are validated.

A comment before a block says how the block is tested. `<!-- docs-test: ranks=2 given=loop -->` runs it on two ranks
with the names of `GIVEN["loop"]`. `<!-- docs-test: compile -->` is for fragments, which only have to compile.
"""

from __future__ import annotations

import ast
import configparser
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig

import hf_context_parallel as hcp
from hf_context_parallel.verification.types.tiny import tiny_config, tiny_model
from tests.helpers.images import image_collator, image_model, image_samples
from tests.helpers.models import needs_sharding_while_loading
from tests.helpers.recipe import MINIMAL

# Modules that start commands are imported where they are used, because workers that run blocks import this file too.
ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.cfg").exists())
FOLDERS = "*.md", ".github/**/*.md", "docs/**/*.md", "recipes/*.md"
PAGES = sorted(page for pattern in FOLDERS for page in ROOT.glob(pattern))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PROGRAMS = ("make", "accelerate", "hf-context-parallel", "pip", "python", "pytest", "pre-commit")
MARKER = "<!-- docs-test:"
VOCABULARY = 64


class Block(NamedTuple):
    """Fenced block: its page, line and language, the marker before it, and its text."""

    page: str
    line: int
    language: str
    marker: str
    text: str

    @property
    def ranks(self) -> int:
        found = re.search(r"ranks=(\d+)", self.marker)
        return int(found[1]) if found else 1

    @property
    def given(self) -> str | None:
        found = re.search(r"given=(\w+)", self.marker)
        return found[1] if found else None


def fenced_blocks(page: Path) -> list[Block]:
    lines, found = page.read_text(encoding="utf-8").splitlines(), []
    name, opened, before = str(page.relative_to(ROOT)), None, ""
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened, language, marker, text = number, line.strip().strip("`"), before, []
            else:
                marker = marker if marker.startswith(MARKER) else ""
                found.append(Block(name, opened, language, marker, "\n".join(text) + "\n"))
                opened = None
        elif opened is not None:
            text.append(line)
        before = line
    assert opened is None, f"{name}:{opened}: the block does not end"
    return found


def commands(page: Path) -> list[str]:
    """List the commands of a page: the lines of indented blocks, which hold only commands, and those in backticks."""
    text = re.sub(r"^( *)```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"(?<=\n)    (?! )(.+)", text)
    inline = (code for code in re.findall(r"`([^`\n]+)`", re.sub(r"(?<=\n)    .+", "", text)) if " " in code)
    found += [code for code in inline if code.split()[0] in PROGRAMS and "..." not in code.split("=")[0]]
    return [re.sub(r"\s{2,}# .*", "", command) for command in found]


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]


def of_language(*languages: str) -> list:
    return [
        pytest.param(
            block,
            id=f"{block.page}:{block.line}",
            marks=needs_sharding_while_loading if block.given == "tensor_parallel" else (),
        )
        for block in BLOCKS
        if block.language in languages
    ]


def test_blocks_have_a_known_language():
    assert {block.language for block in BLOCKS} <= {"python", "yaml", "text"}


# Names that blocks use without defining them.


def tiny_qwen3() -> Qwen3Config:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    return Qwen3Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads)


def rows(count: int) -> list[dict]:
    ids = torch.randint(3, VOCABULARY, (count, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def training(folder: Path) -> dict:
    tokenizer = transformers.ByT5Tokenizer()
    return {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": str(folder / "model"),
        "args": transformers.TrainingArguments(
            str(folder / "output"), use_cpu=True, max_steps=1, report_to="none", save_strategy="no"
        ),
        "dataset": rows(32),
        "collator": DataCollatorForSeq2Seq(tokenizer),
    }


def images(folder: Path) -> dict:
    path = folder / "images"
    image_model("qwen3_vl", None).save_pretrained(path)  # which the first rank writes
    torch.distributed.barrier()
    return {
        "AutoModelForImageTextToText": transformers.AutoModelForImageTextToText,
        "name": str(path),
        "batch": image_collator(image_samples("qwen3_vl", ((0,), (1,)))),
        "hcp": hcp,
    }


def loop(folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="context_parallel")
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
    loader = DataLoader(rows(2), batch_size=1, collate_fn=DataCollatorForSeq2Seq(transformers.ByT5Tokenizer()))
    return {"hcp": hcp, "cp": cp, "model": model, "loader": loader, "batch": next(iter(loader))}


def own_loop(folder: Path) -> dict:
    given = loop(folder)
    optimizer = torch.optim.AdamW(given["model"].parameters())
    return {**given, "accelerator": Accelerator(cpu=True), "optimizer": optimizer, "name": str(folder / "model")}


def attention(folder: Path) -> dict:
    cp = hcp.ContextParallel(hcp.ContextParallelConfig(size=2))
    q, k, v = torch.randn(3, 1, 4, len(cp.positions(1000)), 8)
    return {"cp": cp, "q": q, "k": k, "v": v, "sinks": torch.zeros(4)}


def tensor_parallel(folder: Path) -> dict:
    return {**training(folder), "hcp": hcp, "DistributedConfig": DistributedConfig}


def sft(folder: Path) -> dict:
    """Make the model, the data set and the arguments of a short run of TRL's SFTTrainer."""
    from trl import SFTConfig

    from hf_context_parallel.verification.trainers.samples import make_samples, make_tokenizer

    tokenizer = make_tokenizer()
    config = tiny_config("llama", vocab_size=len(tokenizer))
    tiny_model(config, None, torch.float32).save_pretrained(folder / "model")
    args = SFTConfig(str(folder / "output"), use_cpu=True, bf16=False, max_steps=1, report_to="none", max_length=64)
    return {
        "hcp": hcp,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": str(folder / "model"),
        "args": args,
        "dataset": make_samples("text", 16, str(folder)),
        "tokenizer": tokenizer,
    }


GIVEN = {
    "sft": sft,
    "training": training,
    "loop": loop,
    "own_loop": own_loop,
    "images": images,
    "attention": attention,
    "tensor_parallel": tensor_parallel,
}


def run_block(source: str, given: str | None, folder: Path) -> None:
    torch.manual_seed(0)
    exec(compile(source, "block", "exec"), GIVEN[given](folder) if given else {})


@pytest.mark.parametrize("block", of_language("python"))
def test_python_runs(block, on_ranks, tmp_path):
    if "compile" in block.marker:
        compile(block.text, f"{block.page}:{block.line}", "exec", ast.PyCF_ONLY_AST)
        return
    torch.manual_seed(0)
    Qwen3ForCausalLM(tiny_qwen3()).save_pretrained(tmp_path / "model")
    on_ranks(block.ranks, run_block, block.text, block.given, tmp_path)


def test_few_blocks_are_fragments():
    assert sum("compile" in block.marker for block in BLOCKS) <= 3


@pytest.mark.parametrize("block", of_language("yaml"))
def test_recipes_are_valid(block, tmp_path):
    from hf_context_parallel.recipe.reading import load_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MINIMAL + block.text if "model:" not in block.text else block.text)
    load_recipe(recipe)


# Commands.


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_commands_are_right(name):
    for command in commands(ROOT / name):
        program, *arguments = shlex.split(command)
        assert program in PROGRAMS, f"{name}: {command!r} starts nothing that is known here"
        CHECKS[program](arguments)


def check_make(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def check_our_command(arguments: list[str]) -> None:
    import typer

    from hf_context_parallel.cli import app

    group = typer.main.get_command(app)
    if arguments:
        command, *rest = arguments
        given = group.commands[command].make_context(command, list(rest)).params
        check_recipe(given.get("recipe"), given.get("overrides") or ())


def check_recipe(path: str | Path | None, overrides: list[str] | tuple[str, ...]) -> None:
    from hf_context_parallel.recipe.reading import load_recipe

    if path is not None:
        load_recipe(ROOT / path, overrides)


def check_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    if len(arguments) == 1:
        return  # the command's name
    parsed = launch_command_parser().parse_args(arguments[1:])
    if parsed.module:
        assert importlib.util.find_spec(parsed.training_script)
        recipe, *overrides = parsed.training_script_args
        check_recipe(recipe, overrides)
    else:
        source = (ROOT / parsed.training_script).read_text()
        for option in parsed.training_script_args:
            assert not option.startswith("--") or f'"{option}"' in source, f"{parsed.training_script} has no {option}"


def check_python(arguments: list[str]) -> None:
    flag, module, *rest = arguments
    assert flag == "-m" and importlib.util.find_spec(module), module
    told = help_of(module) if rest else ""
    for option in rest:
        assert not option.startswith("--") or option in told, f"{module} has no {option}"


@cache
def help_of(module: str) -> str:
    """Return what `python -m module --help` prints. It runs in this process, which has imported the package."""
    told = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, "--help"]),
        redirect_stdout(told),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code, f"{module} --help exits with {ended.value.code}"
    return told.getvalue()


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        assert argument.startswith("-") or not argument.endswith(".py") or (ROOT / argument).exists(), argument


def check_pip(arguments: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert arguments[0] == "install"
    for extras in re.findall(r"\[(.*?)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(setup["options.extras_require"]), extras


CHECKS = {
    "make": check_make,
    "accelerate": check_accelerate,
    "hf-context-parallel": check_our_command,
    "pip": check_pip,
    "python": check_python,
    "pytest": check_pytest,
    "pre-commit": lambda arguments: None,
}


# Links, lengths and translations.


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.split("#")[0]).exists(), f"{name}: {target}"


def test_pages_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    for page in (ROOT / "docs" / "design").glob("*.md"):
        assert len(page.read_text().splitlines()) <= 120, page


def test_the_translation_has_the_same_code_and_numbers():
    pages = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
    python, lines, table = (
        [read(page) for page in pages]
        for read in (
            lambda page: [ast.dump(ast.parse(block.text)) for block in fenced_blocks(page)],
            lambda page: [command for command in commands(page) if command.split()[0] in PROGRAMS],
            lambda page: re.findall(r"\b0\.\d\d\b", page.read_text(encoding="utf-8")),
        )
    )
    assert python[0] == python[1] and sorted(lines[0]) == sorted(lines[1]) and table[0] == table[1]


FOREIGN = {"docs/comparison.md": "\n## torch"}
"""Pages that name files of other projects, each with the heading from which on they do."""

FILE = re.compile(r"(?<![\w./-])[\w./-]*\w\.(?:py|md|json|jsonl|yaml|png|toml|cfg)\b")
FOLDER = re.compile(r"(?<![\w./-])(?:hf_context_parallel|tests|benchmarks|docs|recipes|examples)/[\w./-]*")


def named_files(page: Path) -> set[str]:
    """Return the paths of files and folders that a page names, in text, links and code."""
    text = page.read_text(encoding="utf-8")
    text = text.split(FOREIGN.get(str(page.relative_to(ROOT)), "\0"))[0]
    text = re.sub(r"https?://\S+", "", text)
    return {path.rstrip("./") for path in {*FILE.findall(text), *FOLDER.findall(text)}}


@cache
def project_paths() -> list[str]:
    """List the files and folders of the project, from its root, each between slashes."""
    tops = [ROOT / name for name in ("hf_context_parallel", "tests", "benchmarks", "docs", "recipes", "examples")]
    found = [*ROOT.glob("*.*"), *tops, *(path for top in tops for path in top.rglob("*"))]
    return [f"/{path.relative_to(ROOT).as_posix()}/" for path in found]


@pytest.mark.parametrize("name", NAMES)
def test_files_that_pages_name_exist(name):
    """A page may name a file from the root, from its own folder, or by the end of its path."""
    page = ROOT / name
    wanted = named_files(page) - {"config.json"}  # a file of models of the hub
    missing = {
        path
        for path in wanted
        if not (page.parent / path).exists() and not any(one.endswith(f"/{path}/") for one in project_paths())
    }
    assert not missing
