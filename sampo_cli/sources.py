"""Where pairs come from: a source's name to its files.

Nothing is read here but file names and a folder's README; rows are read in `readers.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sampo_cli.data_card import check_card
from sampo_cli.datafile import DataFile, format_of, is_array
from sampo_cli.errors import DataError
from sampo_cli.remote import DATA_FILES, fetch, first_line, is_path_like

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PREFERRED_SPLITS = ("train", "train_prefs")


def find(source: str, revision: str | None = None) -> list[DataFile]:
    """The files of a source: a file, a folder, or a name on the Hub; the last two with `:split` or `:config:split`.

    Raises:
        DataError: no such file or folder, no data in it, no such split, or files in it that would be left out.
        HubError: no network, no access, no such data set.
    """
    if _exists(source, Path.is_file):
        return [_data_file(Path(source).expanduser(), source)]
    name, config, split = (source, None, None) if _exists(source, Path.is_dir) else _parse(source)
    if _exists(name, Path.is_dir):
        folder = Path(name).expanduser().resolve()
        paths = _split_files(folder, name, config, split)
        _refuse_left_out(folder, name, paths)
        return [_data_file(path, str(Path(name) / path.relative_to(folder))) for path in paths]
    if is_path_like(name):
        raise DataError(f"data not found: there is no file or folder '{name}'", hint="check the path")
    folder = fetch(name, "dataset", revision=revision, patterns=DATA_FILES).resolve()
    paths = _split_files(folder, name, config, split)
    return [_data_file(path, f"{name}/{path.relative_to(folder)}", name) for path in paths]


def _exists(name: str, kind: Callable[[Path], bool]) -> bool:
    """True for a file or folder, as `kind` asks; a path that may not be looked at is a `DataError`."""
    try:
        return kind(Path(name).expanduser())
    except RuntimeError as error:
        raise DataError(f"data '{name}': {first_line(error)}", hint="write the folder's whole path") from error
    except OSError as error:
        raise DataError(f"data '{name[:200]}': {error.strerror or first_line(error)}", hint="check the path") from error


def _parse(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and split of `name`, `name:split` or `name:config:split`."""
    name, *rest = source.split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise DataError(f"data '{source}': expected a file, a folder, 'name', 'name:split' or 'name:config:split'")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None


def _data_file(path: Path, name: str, source: str | None = None) -> DataFile:
    suffix = format_of(path)
    if suffix not in FORMATS:
        raise DataError(f"{name}: not a format that is read", hint=f"use {', '.join(FORMATS)}, each also as .gz")
    by_line = suffix in (".jsonl", ".csv") or (suffix == ".json" and not is_array(path, name))
    return DataFile(path, name, source, by_line)


def _split_files(folder: Path, name: str, config: str | None, split: str | None) -> list[Path]:
    """The files of one split of a folder, found by the rules of the datasets library (README, names, subfolders)."""
    from datasets import load_dataset_builder

    if not folder.is_dir():
        raise DataError(f"data '{name}': it has no {', '.join(FORMATS)} files")
    check_card(name, folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            builder = load_dataset_builder(str(folder), name=config, cache_dir=scratch)
        except Exception as error:  # whatever the folder's README makes the library raise
            reason = " ".join(str(error).split())[:300]  # what there is to choose from is on its second line
            raise DataError(
                f"data '{name}': {reason}", hint=f"put {', '.join(FORMATS)} files into it, or name one file"
            ) from error
    splits = {str(key): [Path(path) for path in paths] for key, paths in (builder.config.data_files or {}).items()}
    wanted = split or next((known for known in PREFERRED_SPLITS if known in splits), None)
    if wanted is None and len(splits) == 1:
        (wanted,) = splits
    if wanted not in splits:
        problem = f"no split '{split}'" if split else "no split 'train'"
        raise DataError(f"data '{name}': {problem}; it has {', '.join(sorted(splits))}", hint=f"write '{name}:SPLIT'")
    outside = [path for path in splits[wanted] if not path.is_relative_to(folder) or ".." in path.parts]
    if outside:
        raise DataError(f"data '{name}': its README names a file outside of it: {outside[0]}")
    return splits[wanted]


def _refuse_left_out(folder: Path, name: str, paths: Sequence[Path]) -> None:
    """Of files of several formats, the datasets library takes the most frequent format and passes over the others."""
    taken = {_family(path) for path in paths}
    left_out = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if format_of(path) in FORMATS and _family(path) not in taken and not _is_hidden(path.relative_to(folder))
    )
    if left_out and not _lists_its_files(folder):
        raise DataError(
            f"data '{name}': files of several formats; {left_out[0]} would be left out ({len(left_out)} in all)",
            hint="name the files that are meant, each with --data, or move the others away",
        )


def _family(path: Path) -> str:
    """The formats that the datasets library reads as one."""
    return format_of(path).removesuffix("l")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _lists_its_files(folder: Path) -> bool:
    from huggingface_hub import metadata_load

    readme = folder / "README.md"
    return readme.is_file() and "configs" in (metadata_load(readme) or {})
