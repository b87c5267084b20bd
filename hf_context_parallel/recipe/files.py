"""Data files of a recipe on this machine: found, and their beginning read, before a process starts."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import glob
import importlib
import inspect
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import load_dataset
from pyarrow import ArrowInvalid

from hf_context_parallel.recipe.content import COLUMNS, LABELS, check_content, check_lengths
from hf_context_parallel.recipe.errors import RecipeError, did_you_mean
from hf_context_parallel.recipe.schema import DRAWN, DataSection
from hf_context_parallel.recipe.trl_columns import TrlColumns

FOLDERS = ("imagefolder", "audiofolder", "videofolder", "webdataset")
BUILDERS = ("text", "json", "csv", "parquet", "arrow", "xml", *FOLDERS)
"""Names that `load_dataset` takes for a format of local files."""
SPLIT = re.compile(r"(\w+(?:\.\w+)*)(?:\[[^]]*\])?")
"""One summand of a split, such as `train[:10%]`."""
SECONDS = 1.0
"""Time in which the beginning of the files is read."""
BLOCK = 1 << 20
LARGEST_ARRAY = 8 * BLOCK
"""Size in bytes of the largest file that is read whole, because it is one JSON value."""


def check_files(section: DataSection, trl: TrlColumns | None = None, seconds: float = SECONDS) -> None:
    """Refuse data files of this machine that are missing, empty or malformed, or lack what the recipe names.

    Nothing is downloaded, and what is not on this machine is not checked.

    Args:
        trl: columns of the trainer of TRL, if there is one; those of the section are not used then.
        seconds: time after which reading ends. All files are read whole if it is infinite.

    Raises:
        RecipeError: naming the file, and the line where there is one.
    """
    _check_options(section)
    files = find_files(section)
    if files is None:
        return
    _check_splits(section, list(files))
    end = time.monotonic() + seconds
    for paths in files.values():
        sizes = [path.stat().st_size for path in paths]
        if not any(sizes) or (section.path == "json" and not all(sizes)):
            raise RecipeError(f"data.data_files: {paths[sizes.index(0)]} is empty. Fill it or leave it out.")
        for path in paths:
            _check_file(path, section, trl, end)


def _check_options(section: DataSection) -> None:
    """Refuse options that the format of local files does not have."""
    if section.path not in ("text", "json", "csv", "parquet"):
        return
    module = importlib.import_module(f"datasets.packaged_modules.{section.path}.{section.path}")
    of_format = {field.name for field in dataclasses.fields(getattr(module, f"{section.path.capitalize()}Config"))}
    known = of_format | {*inspect.signature(load_dataset).parameters}
    for name in section.options:
        if name not in known:
            raise RecipeError(
                f"data.options: {name!r} is no option of data.path={section.path!r}.{did_you_mean(name, known)}"
            )


def find_files(section: DataSection) -> dict[str, list[Path]] | None:
    """Find the data files of each split. It is None if they are not named, or not on this machine.

    Raises:
        RecipeError: if a folder, a file or a pattern finds nothing.
    """
    folder = Path(section.path).expanduser()
    if folder.is_file():
        raise RecipeError(
            f"data.path: {section.path!r} is a file. Name its format there, such as json, and the file in "
            "data.data_files."
        )
    if section.path not in BUILDERS and not folder.is_dir():
        if section.path.startswith((".", "/", "~")):
            raise RecipeError(f"data.path: there is no folder {section.path!r}. Correct it.")
        return None
    base = Path(section.data_dir or "").expanduser()
    base = base if section.path in BUILDERS else folder / base
    if not base.is_dir() and "://" not in str(section.data_dir):
        raise RecipeError(f"data.data_dir: there is no folder {str(base)!r}. Correct it.")
    given = section.data_files
    if given is None:
        if section.path in BUILDERS and section.data_dir is None:
            raise RecipeError(f"data.data_files: it is missing, and data.path={section.path!r} needs it. Add it.")
        if next(base.iterdir(), None) is None:
            raise RecipeError(f"data: the folder {str(base)!r} is empty. Correct data.path or data.data_dir.")
        return None
    of_splits = given if isinstance(given, dict) else {"train": given}
    found: dict[str, list[Path]] = {}
    for split, patterns in of_splits.items():
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not patterns:
            raise RecipeError(f"data.data_files: it names no file for the split {split!r}. Add one.")
        if any("://" in pattern for pattern in patterns):
            return None
        found[split] = [path for pattern in patterns for path in _matches(base, pattern)]
    return found


def _matches(base: Path, pattern: str) -> list[Path]:
    whole = base / Path(pattern).expanduser()
    if whole.is_dir():
        raise RecipeError(
            f"data.data_files: {pattern!r} is a folder. Give a pattern, such as {pattern.rstrip('/')}/*, or name "
            "it in data.data_dir."
        )
    found = [Path(path) for path in sorted(glob.glob(str(whole), recursive=True)) if Path(path).is_file()]
    found = [whole] if whole.is_file() else found
    if not found:
        raise RecipeError(
            f"data.data_files: no file matches {pattern!r}, looked for in {str(base.resolve())!r}. Correct the name "
            "or the pattern; names are relative to the folder where the run is started, or to data.data_dir."
        )
    return found


def _check_splits(section: DataSection, splits: list[str]) -> None:
    for key in ("split", "eval_split"):
        for part in (getattr(section, key) or splits[0]).split("+"):
            named = SPLIT.fullmatch(part.strip())
            if named is not None and named[1] not in (*splits, "all"):
                remedy = "Give data.data_files a list of files for each split, such as {train: a, test: b}."
                raise RecipeError(
                    f"data.{key}: there is no split {named[1]!r}, only {', '.join(splits)}."
                    f"{did_you_mean(named[1], splits) if len(splits) > 1 else ' ' + remedy}"
                )


def _check_file(path: Path, section: DataSection, trl: TrlColumns | None, end: float) -> None:
    """Check the beginning of a file, as far as its format is known."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise RecipeError(f"data.data_files: {path} cannot be read ({error.strerror}). Correct its rights.") from error
    if head[:2] == b"\x1f\x8b" or head in (b"\x28\xb5\x2f\xfd", b"PK\x03\x04") or head[:3] in (b"BZh", b"\xfd7z"):
        return  # compressed
    if section.path == "json":
        if "field" not in section.options:
            _check_json(path, section, trl, end)
    elif section.path == "text":
        _check_columns(["text"], path, section, trl)
        if "encoding_errors" not in section.options:
            _check_encoding(path, section.options.get("encoding", "utf-8"), end)
    elif section.path == "csv":
        if not {"names", "header", "column_names"} & section.options.keys():
            mark = section.options.get("sep") or section.options.get("delimiter") or ","
            with path.open(encoding=section.options.get("encoding", "utf-8"), errors="replace", newline="") as text:
                _check_columns(next(csv.reader(text, delimiter=mark), []), path, section, trl)
    elif section.path == "parquet":
        try:
            names = pyarrow.parquet.read_schema(path).names
        except (ArrowInvalid, OSError) as error:
            raise RecipeError(f"data.data_files: {path} is no Parquet file ({error}). Correct data.path.") from error
        _check_columns(names, path, section, trl)


def _check_columns(names: list[str], path: Path | str, section: DataSection, trl: TrlColumns | None) -> None:
    """Refuse a file that lacks a column of the recipe."""
    if trl is not None:
        trl.check_names(names, str(path))
        return
    columns = {"data.column": section.column or COLUMNS[section.format]}
    if section.images not in (None, DRAWN):
        columns["data.images"] = str(section.images)
    for key, column in columns.items():
        if column not in names:
            raise RecipeError(f"{key}: no column {column!r} in {path}. Name one of {', '.join(names)}.")


def _check_encoding(path: Path, encoding: str, end: float) -> None:
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = 0
    with path.open("rb") as file:
        while time.monotonic() < end and (block := file.read(BLOCK)):
            try:
                lines += decoder.decode(block).count("\n")
            except UnicodeDecodeError as error:
                raise _not_encoded(path, lines + error.object[: error.start].count(b"\n") + 1, error) from error


def _not_encoded(path: Path, line: int, error: UnicodeDecodeError) -> RecipeError:
    return RecipeError(
        f"data.data_files: line {line} of {path} is not {error.encoding} ({error.reason}). Convert the file, or name "
        "its encoding: data.options={encoding: latin-1}."
    )


def _check_json(path: Path, section: DataSection, trl: TrlColumns | None, end: float) -> None:
    first = True
    for where, document in _json_documents(path, section.options.get("encoding", "utf-8"), end):
        if not isinstance(document, dict):
            raise RecipeError(f'data.data_files: {where} is no object, such as {{"text": "..."}}. Correct it.')
        if trl is not None:
            trl.check_document(document, where)
            continue
        column = section.column or COLUMNS[section.format]
        if first or column not in document:
            _check_columns([*document], where, section, None)
        first = False
        check_content(document[column], section.format, column, where)
        if section.format == "tokens" and document.get(LABELS) is not None:
            check_content(document[LABELS], "tokens", LABELS, where)
            check_lengths(document[column], document[LABELS], where)


def _json_documents(path: Path, encoding: str, end: float) -> Iterator[tuple[str, Any]]:
    """Read the documents of a file of JSON lines, or of a JSON list, each with words that say where it is.

    A file that is one object over several lines yields no document, and neither does a large list.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if time.monotonic() > end:
                return
            where = f"line {number} of {path}"
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError as error:
                raise _not_encoded(path, number, error) from error
            if not text.strip():
                continue
            try:
                document = json.loads(text)
            except json.JSONDecodeError as error:
                whole = _whole_value(path, encoding) if number == 1 and text.lstrip()[0] in "[{" else None
                if whole is None:
                    raise RecipeError(
                        f"data.data_files: {where} is malformed JSON ({error.msg} at column {error.colno}). Correct "
                        "the line."
                    ) from error
                document = whole
                if not isinstance(document, list):
                    return
            if number > 1 or not isinstance(document, list):
                yield where, document
                continue
            for entry, content in enumerate(document, start=1):
                yield f"entry {entry} of {path}", content
            return


def _whole_value(path: Path, encoding: str) -> Any:
    """Read a file that is one JSON value. It is None if it is none, and empty if it is a large one."""
    if path.stat().st_size > LARGEST_ARRAY:
        return []
    try:
        return json.loads(path.read_text(encoding))
    except ValueError:
        return None
