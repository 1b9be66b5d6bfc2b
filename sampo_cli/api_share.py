"""Functions that make something of a run for others: merged, exported, published. Each does what its command does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from sampo_cli.calls import Place, frees_models, interface, text
from sampo_cli.errors import UsageError

if TYPE_CHECKING:
    from sampo_cli.adapter_export import AdapterExport
    from sampo_cli.export import Export
    from sampo_cli.hub import PushPlan
    from sampo_cli.merging import MergeResult
    from sampo_cli.upload import PushResult


@overload
def merge(
    source: Place,
    *,
    base: Place | None = ...,
    output: Place | None = ...,
    dtype: str = ...,
    gguf: None = ...,
    llama_cpp: None = ...,
    adapter_only: Literal[False] = ...,
    trust_remote_code: bool = ...,
    quiet: bool = ...,
) -> MergeResult: ...


@overload
def merge(
    source: Place,
    *,
    base: Place | None = ...,
    output: Place | None = ...,
    dtype: str = ...,
    gguf: str | None = ...,
    llama_cpp: Place | None = ...,
    adapter_only: bool = ...,
    trust_remote_code: bool = ...,
    quiet: bool = ...,
) -> MergeResult | Export | AdapterExport: ...


@interface
@frees_models
def merge(
    source: Place,
    *,
    base: Place | None = None,
    output: Place | None = None,
    dtype: str = "bfloat16",
    gguf: str | None = None,
    llama_cpp: Place | None = None,
    adapter_only: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> MergeResult | Export | AdapterExport:
    """Merge an adapter into its 16-bit base: a plain model for vLLM, llama.cpp, transformers.

    Args:
        source: a run's folder or an adapter's.
        base: the 16-bit base, if not the recorded one.
        output: the new folder; `merged/` in the run if not given.
        dtype: bfloat16, float16 or float32.
        gguf: also a file for llama.cpp and Ollama: f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m. An `Export` is returned.
        llama_cpp: a checkout of llama.cpp; what is on the PATH if not given.
        adapter_only: do not merge, but write the adapter for vLLM's and PEFT's loaders. Returns an `AdapterExport`.
        trust_remote_code: run Python code that comes with the base.
        quiet: say nothing of what is being done.

    Raises:
        SampoError: of the kind that `sampo merge` would end with.
    """
    place = Path(output) if output else None
    if adapter_only:
        if base or gguf or llama_cpp or trust_remote_code:
            hint = "leave out --base, --gguf, --llama-cpp and --trust-remote-code"
            raise UsageError("--adapter-only merges nothing", hint=hint)
        from sampo_cli.adapter_export import export_adapter

        return export_adapter(Path(source), output=place, dtype=dtype)
    if gguf is None:
        if llama_cpp:
            raise UsageError("--llama-cpp is for --gguf", hint="add --gguf q8_0, or leave it out")
        from sampo_cli.merging import merge as merge_adapter

        trusted = trust_remote_code
        return merge_adapter(Path(source), base=text(base), output=place, dtype=dtype, trust_remote_code=trusted)
    from sampo_cli.console import say
    from sampo_cli.export import export_gguf

    return export_gguf(
        Path(source),
        gguf,
        llama_cpp=Path(llama_cpp) if llama_cpp else None,
        output=place,
        note=(lambda _: None) if quiet else say,
        base=text(base),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


@overload
def push_to_hub(
    source: Place, *, repo: str, merged: bool = ..., public: bool = ..., dry_run: Literal[False] = ...
) -> PushResult: ...


@overload
def push_to_hub(
    source: Place, *, repo: str, merged: bool = ..., public: bool = ..., dry_run: Literal[True]
) -> PushPlan: ...


@overload
def push_to_hub(
    source: Place, *, repo: str, merged: bool = ..., public: bool = ..., dry_run: bool
) -> PushPlan | PushResult: ...


@interface
def push_to_hub(
    source: Place, *, repo: str, merged: bool = False, public: bool = False, dry_run: bool = False
) -> PushPlan | PushResult:
    """Publish an adapter or a merged model with a card made from the run. What looks like a secret is told on stderr.

    Args:
        source: a run, an adapter or a merged model.
        repo: where to: user/name.
        merged: the run's merged model instead of its adapter.
        public: visible to everybody; private otherwise.
        dry_run: what would be sent; nothing is.

    Raises:
        SampoError: of the kind that `sampo push-to-hub` would end with.
    """
    from sampo_cli import hub, upload
    from sampo_cli.console import say
    from sampo_cli.disk import expanded

    plan = hub.plan(expanded(source), repo=repo, merged=merged, public=public)
    for warning in plan.warnings:
        say(f"warning: {warning}")
    return plan if dry_run else upload.push(plan)
