"""What a command after training is about: a run, an adapter or a model, found by its name and loaded as a policy.

Files are read here, and weights; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampo_cli.adapter import CONFIG_FILE, read_record, read_settings
from sampo_cli.config import Recipe, read_recipe
from sampo_cli.errors import ModelError, UsageError
from sampo_cli.lora import ADAPTER_FILES
from sampo_cli.merging import resolve_adapter
from sampo_cli.plan import resolve_recipe
from sampo_cli.remote import fetch, local_folder
from sampo_cli.settings import Settings, apply_settings, keys_of, put
from sampo_cli.trust import check_consent

if TYPE_CHECKING:
    from sampo_cli.policy import Policy

NO_DATA = "-"
"""Stands for the sources of a subject that has none: a recipe has to name one."""


@dataclass(frozen=True)
class Subject:
    """What a name on the command line means.

    Attributes:
        name: how tables and files call it.
        recipe: of its run, or one made for it; its model section says how the base is loaded.
        adapter: the adapter's folder, or None for a base alone.
        run: the run's folder, if it is the adapter of one.
        own_data: the recipe's sources are those that the run was trained on.
    """

    name: str
    recipe: Recipe
    adapter: Path | None
    run: Path | None
    own_data: bool

    @property
    def base(self) -> str:
        """The base's name, without the folders that it lies in."""
        return Path(self.recipe.model.name).name

    @property
    def has_data(self) -> bool:
        return self.recipe.data.sources != [NO_DATA]


def find_subject(
    name: str,
    *,
    adapter: str | None = None,
    data: Sequence[str] = (),
    quantization: str | None = None,
    settings: Settings = (),
) -> Subject:
    """Find a run, an adapter or a model.

    Args:
        name: a run's folder, an adapter or a model; folders, or names on the Hub.
        adapter: a run's folder or an adapter, on the model that `name` is then.
        data: sources instead of the run's.
        quantization: of the base, instead of what the adapter was trained on; none for a model alone.
        settings: `section.key=value` of a recipe.

    Raises:
        ModelError, HubError: nothing there, or a run that has no adapter yet.
        UsageError: settings that are none, or a run whose recipe alone would allow code to run.
    """
    found = _adapter_folder(adapter or name)
    if adapter and found is None:
        raise ModelError(f"--adapter {adapter}: that is a model, not an adapter", hint="give it as the model")
    run = found.parent if found and (found.parent / "recipe.yaml").is_file() else None
    tree = _tree(run, found, settings)
    if adapter or not found:
        tree["model"] |= {"name": name, "revision": None}
    elif not tree["model"].get("name"):
        raise ModelError(f"adapter {found} does not say what it was trained on", hint="give MODEL --adapter ADAPTER")
    own_data = run is not None and not data
    if not own_data:
        put(tree, "data", "sources", list(data) or [NO_DATA])
        put(tree, "data", "revision", None)
    if quantization:
        put(tree, "model", "quantization", quantization)
    apply_settings(tree, settings)
    recipe = resolve_recipe(tree)
    return Subject((run or found or Path(recipe.model.name)).resolve().name, recipe, found, run, own_data)


def _adapter_folder(name: str) -> Path | None:
    """The folder of the adapter, or of the run's adapter, that `name` names; None if it names a model."""
    folder = local_folder(name)
    if folder is None:
        folder = fetch(name, "model", revision=None, patterns=(*ADAPTER_FILES, "config.json"))
    is_model = (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file()
    return None if is_model else resolve_adapter(folder)


def _tree(run: Path | None, adapter: Path | None, settings: Settings) -> dict[str, Any]:
    """A recipe's tree: the run's, one with what the adapter's files say of its base, or one for a model as it is."""
    if run:
        return _run_tree(run, settings)
    return _adapter_tree(adapter) if adapter else {"model": {"quantization": "none"}}


def _run_tree(run: Path, settings: Settings) -> dict[str, Any]:
    path = run / "recipe.yaml"
    tree = read_recipe(path)
    check_consent(tree, path, given="model.trust_remote_code" in keys_of(settings))
    model = tree.get("model")
    if not isinstance(model, dict):
        raise UsageError(f"{path}: no model section", hint="give the base with MODEL --adapter ADAPTER")
    model["adapter"] = None  # the run's adapter is that one trained further, and stands on the base alone
    return tree


def _adapter_tree(adapter: Path) -> dict[str, Any]:
    settings, record = read_settings(adapter), read_record(adapter)
    model: dict[str, Any] = {
        "name": record.get("base_model") or settings.get("base_model_name_or_path"),
        "revision": record.get("base_revision") or settings.get("revision"),
        "quantization": record.get("quantization", "nf4"),
        "dtype": record.get("dtype", "auto"),
    }
    return {"model": model}


def load_subject(subject: Subject) -> Policy:
    """The base with its adapter, if there is one, ready to score and to answer; it is not to be trained.

    Attention and kernels are transformers' own, whatever the run had: answers need a cache, and a benchmark's rows have
    no pairs in them.

    Raises:
        ModelError, HubError, OutOfMemory: it cannot be loaded, or the adapter was trained on another base.
    """
    from sampo_cli.fingerprint import weights_fingerprint
    from sampo_cli.lora import trained_adapter
    from sampo_cli.lora_linear import join_adapters
    from sampo_cli.model import load_base, pick_device, pick_dtype, settle_layout
    from sampo_cli.policy import Policy
    from sampo_cli.remote import fetch_model

    config = subject.recipe.model
    if config.attention == "flex":
        config = config.model_copy(update={"attention": "auto"})
    device = pick_device()
    model = load_base(config, device)
    if subject.adapter:
        fingerprint = weights_fingerprint(fetch_model(config.name, config.revision))
        model = trained_adapter(model, str(subject.adapter), fingerprint)
        join_adapters(model)
    policy = Policy(model, dtype=pick_dtype(config.dtype, device))
    policy.eval()
    settle_layout(policy, config)
    return policy
