"""`sampo merge --gguf`: the merged model, and a file of it for llama.cpp and Ollama.

Converter and quantizer are llama.cpp's where they are installed; what can be written without them is `gguf_write.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampo_cli.checkpoint import whole_folder
from sampo_cli.disk import check_room, expanded, megabytes
from sampo_cli.errors import UsageError, nearest
from sampo_cli.fingerprint import adapter_digest, merged_from, read_header, read_json, weight_files
from sampo_cli.llama_cpp_tools import INSTALL_QUANTIZER, Tools, convert, find_tools, quantize
from sampo_cli.merging import MergeResult, default_output, merge, resolve_adapter
from sampo_cli.serving import gguf_commands, model_commands

if TYPE_CHECKING:
    from sampo_cli.config import DataConfig

BITS = {"f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}
"""`--gguf` -> bits a weight, of a large model."""

UNROUNDED = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""The merged model's dtype -> the GGUF type that holds it as it is."""

_DIRECT = ("f16", "bf16", "q8_0")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file and its Modelfile.

    Attributes:
        kind: how its weights are stored, a key of `BITS`.
        size: bytes.
        converter: what wrote it: llama.cpp's converter, or the package gguf.
        template: the Modelfile has the chat template.
    """

    file: Path
    modelfile: Path
    kind: str
    size: int
    converter: str
    template: bool


@dataclass(frozen=True)
class Export:
    """What is there now.

    Attributes:
        model: the merged model's folder.
        merged: what merging did, or None where the model was there already.
        gguf: the GGUF file.
    """

    model: Path
    merged: MergeResult | None
    gguf: GgufFile

    @property
    def commands(self) -> dict[str, str]:
        """By program, how it takes what was written."""
        return model_commands(self.model) | gguf_commands(self.gguf.file, self.gguf.modelfile, _name(self.model))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        facts: dict[str, Any] = self.merged.to_dict() if self.merged else {"output": str(self.model)}
        paths = {"file": str(self.gguf.file), "modelfile": str(self.gguf.modelfile)}
        return {**facts, "gguf": {**vars(self.gguf), **paths}, "commands": self.commands}

    def facts(self) -> dict[str, str]:
        """What to show, in words."""
        facts = self.merged.facts() if self.merged else {"model": f"{self.model} (was there, and is of this adapter)"}
        facts["gguf"] = f"{self.gguf.file} ({megabytes(self.gguf.size)}, written by {self.gguf.converter})"
        without = "" if self.gguf.template else " (without TEMPLATE: see in it why)"
        return facts | {"modelfile": f"{self.gguf.modelfile}{without}"} | self.commands


def export_gguf(
    source: Path,
    kind: str,
    *,
    llama_cpp: Path | None = None,
    output: Path | None = None,
    dtype: str = "bfloat16",
    note: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Export:
    """Merge a run's adapter, or an adapter's folder, and write a GGUF file of it.

    A model that was merged from this adapter into that dtype before is not merged again.

    Args:
        kind: a key of `BITS`.
        llama_cpp: a folder with llama.cpp's converter and quantizer; those on the PATH if None.
        dtype: of the merged model.
        note: told what is being done.
        options: more for `merge`.

    Raises:
        UsageError: an unknown type, one that a tool is missing for, or a file or another model that is there already.
        ModelError: a model that cannot be written as GGUF; the merged one is kept.
        SampoError: a tool that failed, no room on the disk.
        and what `merge` raises.
    """
    tools = find_tools(expanded(llama_cpp) if llama_cpp else None)
    check_tools(kind, tools)
    adapter = resolve_adapter(source)
    model = expanded(output) if output else default_output(adapter)
    target = gguf_folder(model) / kind
    if target.exists():
        raise UsageError(f"{target} is already there", hint="delete it, or give another --output")
    merged = None
    if merged_from(model) != adapter_digest(adapter):
        note(f"merging into {model}")
        merged = merge(source, output=output, dtype=dtype, **options)
    elif (there := read_json(model / "config.json").get("dtype")) != dtype:
        hint = f"take it with --dtype {there}, give another --output, or delete it"
        raise UsageError(f"{model} is already there, in {there} and not {dtype}", hint=hint)
    file = write(
        model,
        target,
        kind,
        tools=tools,
        name=_name(model),
        data=_data_config(adapter),
        trust=options.get("trust_remote_code", False),
        note=note,
    )
    return Export(model, merged, file)


def check_tools(kind: str, tools: Tools) -> None:
    """Before anything is merged: can this type of file be written at all?

    Raises:
        UsageError: no such type, or something that it needs is not installed.
    """
    if kind not in BITS:
        raise UsageError(f"--gguf {kind}: not known{nearest(kind, BITS)}", hint=f"one of {', '.join(BITS)}")
    if tools.converter is None and find_spec("gguf") is None:
        raise UsageError("--gguf needs the package gguf", hint="pip install gguf, or install llama.cpp")
    if kind not in _DIRECT and tools.quantizer is None:
        raise UsageError(f"--gguf {kind} needs llama.cpp's quantizer", hint=f"{INSTALL_QUANTIZER}; or take q8_0")


def gguf_folder(model: Path) -> Path:
    """Where the GGUF files of a merged model go: beside it."""
    if model.name == "merged":
        return model.with_name("gguf")
    return model.with_name(f"{model.absolute().name.removesuffix('-merged')}-gguf")


def _name(model: Path) -> str:
    """What a merged model is called: as the run it is of."""
    whole = model.absolute()
    return whole.parent.name if whole.name == "merged" else whole.name.removesuffix("-merged")


def _data_config(adapter: Path) -> DataConfig:
    """What the run says of its template; the defaults without a run."""
    from sampo_cli.config import DataConfig, read_recipe

    recipe = adapter.parent / "recipe.yaml"
    tree = read_recipe(recipe).get("data") if recipe.is_file() else None
    section = tree if isinstance(tree, dict) else {}
    known = {key: str(section[key]) for key in ("template_date",) if key in section}
    return DataConfig.model_validate({"sources": ["none"], **known})


def write(
    model: Path,
    target: Path,
    kind: str,
    *,
    tools: Tools,
    name: str,
    data: DataConfig,
    trust: bool,
    note: Callable[[str], None],
) -> GgufFile:
    """Write the folder `target` with a GGUF file and a Modelfile: whole or not at all.

    Raises:
        ModelError, NumericsError, SampoError: as `export_gguf` says.
    """
    from sampo_cli.config import ModelConfig
    from sampo_cli.gguf_write import check_architecture, write_gguf
    from sampo_cli.model import load_config
    from sampo_cli.modelfile import find_turns, modelfile
    from sampo_cli.template import load_tokenizer

    itself = ModelConfig(name=str(model), trust_remote_code=trust)
    config, tokenizer = load_config(itself, model), load_tokenizer(itself, data)
    if tools.converter is None:
        check_architecture(model, config)
    turns = find_turns(tokenizer, data.template_date)
    dtype = str(config.dtype).removeprefix("torch.")
    weights = sum(tensor.elements for path in weight_files(model) for tensor in read_header(path))
    first = kind if kind in _DIRECT else UNROUNDED[dtype]
    bits = BITS[kind] + (0 if first == kind else BITS.get(first, 32))
    size = int(weights * bits / 8 * 1.1)
    check_room(target, size, "the GGUF file", "make room")
    file = f"{name}-{kind.upper()}.gguf"
    try:
        with whole_folder(target, size) as folder:
            written = folder / (file if first == kind else f"{first}.gguf")
            note(f"writing {target / written.name}")
            if tools.converter:
                convert(tools.converter, model, written, first, name)
            else:
                write_gguf(model, written, first, config=config, tokenizer=tokenizer, name=name)
            if tools.quantizer and first != kind:
                note(f"quantizing to {target / file}")
                quantize(tools.quantizer, written, folder / file, kind)
                written.unlink()
            (folder / "Modelfile").write_text(modelfile(file, turns, tokenizer), encoding="utf-8")
    finally:
        with suppress(OSError):
            target.parent.rmdir()  # if nothing is in it
    converter = "llama.cpp's converter" if tools.converter else "the package gguf"
    return GgufFile(target / file, target / "Modelfile", kind, (target / file).stat().st_size, converter, bool(turns))
