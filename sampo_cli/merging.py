"""`sampo merge`: an adapter and its 16-bit base become a plain model.

The model is never built: `merge_plan.py` says which stored tensor gets which update, `merge_write.py` copies the
base's files one tensor at a time, into a folder aside that is renamed at the end. Everything is checked before the
first byte is written. Does not quantize, and does not write the model card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampo_cli.checkpoint import whole_folder
from sampo_cli.disk import check_room, expanded
from sampo_cli.errors import HubError, ModelError, UsageError
from sampo_cli.fingerprint import read_header, read_json, weight_files, weights_fingerprint
from sampo_cli.serving import model_commands
from sampo_cli.trust import check_consent

if TYPE_CHECKING:
    from sampo_cli.adapter import Adapter
    from sampo_cli.drift import Drift

DTYPES = ("bfloat16", "float16", "float32")
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class MergeResult:
    """What was written.

    Attributes:
        shards: safetensors files.
        merged_layers: weights that were changed, each counted once however many adapters change it.
        drift: against the live model that was trained, or None.
        note: why there is no drift.
        warnings: what could not be checked, a line each.
    """

    output: Path
    shards: int
    merged_layers: int
    dtype: str
    drift: Drift | None
    note: str | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        plain = {"output": str(self.output), "warnings": list(self.warnings), "commands": model_commands(self.output)}
        return asdict(self) | plain

    def facts(self) -> dict[str, str]:
        """What to show, in words."""
        files = "1 file" if self.shards == 1 else f"{self.shards} files"
        drift = self.drift.describe() if self.drift else f"not measured: {self.note}"
        facts = {"model": str(self.output), "weights": f"{self.dtype}, {files}, {self.merged_layers} layers merged"}
        facts |= {"drift": drift, **model_commands(self.output)}
        return facts | {"warning": "; ".join(self.warnings)} if self.warnings else facts


@dataclass(frozen=True)
class _Lineage:
    """What is merged into what: adapters, parents first; the base and how it was named."""

    adapters: list[Path]
    name: str
    revision: str | None


def merge(
    source: Path,
    *,
    base: str | None = None,
    output: Path | None = None,
    dtype: str = "bfloat16",
    check_pairs: int = 4,
    texts: Sequence[Sequence[int]] | None = None,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Merge a run's adapter, or an adapter folder, into its 16-bit base and write a plain model.

    Args:
        source: a run's folder or an adapter's.
        base: the base's name or folder; what the adapter says if None. May be the folder of the adapter that this
            one stands on.
        output: the new folder; `merged` in the run's folder, or `<adapter>-merged` beside it, if None.
        dtype: of the written weights.
        check_pairs: pairs on which the merged model is compared with the live one; 0 for no comparison.
        texts: token ids to compare on, instead of the run's pairs.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        UsageError: an unknown dtype, an output folder that is not empty, or a run that was trained with the base's
            own code, which its files alone cannot allow to run again.
        ModelError: no adapter, another parent, a parent that is missing, a quantized base, a module that cannot be
            merged.
        HubError: the base has to be fetched and cannot be.
        NumericsError: a merged weight that is not finite.
        SampoError: no room on the disk.
    """
    check_dtype(dtype)
    adapter_folder = resolve_adapter(source)
    output = new_folder(output or default_output(adapter_folder))
    from sampo_cli.adapter import read_adapter
    from sampo_cli.merge_plan import load_skeleton, make_plan
    from sampo_cli.merge_write import copy_files, files_to_copy, total_size, write_config, write_shard

    _check_consent(adapter_folder, given=trust_remote_code)
    lineage = _find_lineage(adapter_folder, base)
    adapters = [read_adapter(folder) for folder in lineage.adapters]
    base_folder = _base_folder(lineage)
    _check_parent(adapters, base_folder, lineage)
    files = {path: read_header(path) for path in weight_files(base_folder)}
    stored = [tensor for tensors in files.values() for tensor in tensors]
    skeleton = load_skeleton(base_folder, stored, trust_remote_code=trust_remote_code)
    plan = make_plan(adapters, skeleton, dtype)
    others = files_to_copy(base_folder, adapter_folder)
    size = total_size(files.values(), plan, dtype)
    check_room(output, size + size // 100, "the merged model", "make room, or give an --output on another disk")
    with whole_folder(output, size) as folder:
        for path, tensors in files.items():
            write_shard(path, folder / path.name, tensors, plan, dtype)
        write_config(base_folder, folder, size, dtype)
        copy_files(others, adapter_folder, folder)
    drift: Drift | None = None
    note: str | None = "not asked for"
    if check_pairs:
        from sampo_cli.drift import compare_with_live

        drift, note = compare_with_live(
            adapters, base_folder, output, pairs=check_pairs, texts=texts, trust_remote_code=trust_remote_code
        )
    warnings = tuple(
        f"{adapter.folder} does not record the weights of its base; only their shapes were compared"
        for adapter in adapters
        if base is not None and not adapter.record.get("base_fingerprint")
    )
    return MergeResult(output, len(files), len(plan.updates), dtype, drift, note, warnings)


def check_dtype(name: str) -> None:
    """Raises UsageError for what is none of `DTYPES`."""
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: not known", hint=f"one of {', '.join(DTYPES)}")


def new_folder(output: Path) -> Path:
    """The folder to write; raises UsageError where something is there."""
    output = expanded(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is already there", hint="give another --output, or delete it")
    return output


def resolve_adapter(source: Path) -> Path:
    """The adapter's folder of a run's folder or of an adapter's.

    Raises:
        ModelError: there is none; says what is missing and what to do next.
    """
    source = expanded(source)
    if not source.is_dir():
        raise ModelError(f"{source}: there is no such folder", hint="give a run's folder or an adapter's")
    for folder in (source, source / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if (source / "recipe.yaml").is_file():
        raise ModelError(
            f"{source}: a run without adapter/: it has not finished",
            hint=f"go on with: sampo train --resume {source}",
        )
    if (source / "config.json").is_file():
        raise ModelError(f"{source}: a whole model, not an adapter", hint="there is nothing to merge")
    raise ModelError(f"{source}: no {ADAPTER_CONFIG} and no adapter/", hint="give a run's folder or an adapter's")


def default_output(adapter: Path) -> Path:
    """Where the merged model of an adapter goes if nothing else is said."""
    if (adapter.parent / "recipe.yaml").is_file():
        return adapter.parent / "merged"
    return adapter.with_name(f"{adapter.resolve().name}-merged")


def _check_consent(adapter: Path, *, given: bool) -> None:
    from sampo_cli.config import read_recipe

    path = adapter.parent / "recipe.yaml"
    if path.is_file():
        check_consent(read_recipe(path), path, given=given, flag="--trust-remote-code")


def _recorded_parent(adapter: Path) -> tuple[str | None, str | None]:
    """Name and revision of what an adapter was trained on."""
    from sampo_cli.adapter import read_record, read_settings

    settings, record = read_settings(adapter), read_record(adapter)
    return settings.get("base_model_name_or_path"), record.get("base_revision") or settings.get("revision")


def _find_lineage(adapter: Path, base: str | None) -> _Lineage:
    """Follow the parents of an adapter down to the first that is a model."""
    adapters = [adapter]
    given = base if base is not None and _as_adapter(base, None) else None
    name, revision = (given, None) if given else _recorded_parent(adapter)
    while name is not None and (parent := _parent_adapter(adapters[0], name, revision, lenient=base is not None)):
        if parent.resolve() in [folder.resolve() for folder in adapters]:
            raise ModelError(f"adapter {parent} stands on itself", hint="correct base_model_name_or_path")
        adapters.insert(0, parent)
        name, revision = _recorded_parent(parent)
    if base is not None and given is None:
        name, revision = base, None
    if not name:
        raise ModelError(f"adapter {adapters[0]} does not say what it was trained on", hint="give it with --base")
    return _Lineage(adapters, name, revision)


def _as_adapter(name: str, revision: str | None) -> Path | None:
    """The folder of the adapter that `name` names, or None if it names something else."""
    from sampo_cli.remote import fetch

    wanted = (ADAPTER_CONFIG, "adapter_model.safetensors", "config.json")
    folder = fetch(name, "model", revision=revision, patterns=wanted)
    return next((path for path in (folder, folder / "adapter") if (path / ADAPTER_CONFIG).is_file()), None)


def _parent_adapter(child: Path, name: str, revision: str | None, *, lenient: bool) -> Path | None:
    """The parent's folder if it is an adapter. With a base given (`lenient`), a parent out of reach is the base."""
    try:
        return _as_adapter(name, revision)
    except (ModelError, HubError) as error:
        if lenient:
            return None
        raise type(error)(
            f"the adapter {child} stands on '{name}', which is missing: {error.message}",
            hint="put it back there, or say where it is with --base",
        ) from error


def _base_folder(lineage: _Lineage) -> Path:
    """Fetch the base, its config first: what is quantized is refused before its weights are downloaded."""
    from sampo_cli.remote import fetch_model

    folder = fetch_model(lineage.name, lineage.revision, weights=False)
    if _quantized(read_json(folder / "config.json")):
        raise ModelError(
            f"base '{lineage.name}' is quantized: merging into rounded weights loses quality",
            hint="give the 16-bit base with --base",
        )
    return fetch_model(lineage.name, lineage.revision)


def _quantized(config: dict[str, Any]) -> bool:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return any(part.get("quantization_config") for part in parts)


def _check_parent(adapters: list[Adapter], base: Path, lineage: _Lineage) -> None:
    """Compare the weights that the adapters were trained on with the base's, where a run recorded them."""
    recorded = [adapter for adapter in adapters if adapter.record.get("base_fingerprint")]
    actual = weights_fingerprint(base) if recorded else ""
    for adapter in recorded:
        expected = adapter.record["base_fingerprint"]
        if expected != actual and not _trained_on_quantized_files(adapter):
            raise ModelError(
                f"the adapter's parent is another model: {adapter.folder} was trained on "
                f"'{adapter.record.get('base_model')}' (weights {expected}), and '{lineage.name}' has weights {actual}",
                hint="give the model that it was trained on with --base",
            )


def _trained_on_quantized_files(adapter: Adapter) -> bool:
    """True if the recorded base is within reach and itself quantized: its weights cannot equal a 16-bit base's."""
    from sampo_cli.remote import fetch_model

    name, revision = _recorded_parent(adapter.folder)
    try:
        folder = fetch_model(name or "", revision, weights=False)
    except (ModelError, HubError):
        return False
    return _quantized(read_json(folder / "config.json"))
