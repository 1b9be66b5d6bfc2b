"""Commands that make something of a finished run for others: `merge`, `push-to-hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sampo_cli import api_share, completion, console
from sampo_cli.options import RUN, Debug, Json, Quiet, option


def merge(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|ADAPTER", help="A run's folder or an adapter's.", autocompletion=completion.runs),
    ],
    base: Annotated[Optional[str], option("--base", "The 16-bit base, if not the recorded one.", RUN)] = None,
    output: Annotated[Optional[Path], option("--output", "Default: RUN/merged.", RUN, "DIR")] = None,
    dtype: Annotated[
        str,
        option(
            "--dtype", "bfloat16, float16 or float32.", RUN, offers=completion.words("bfloat16", "float16", "float32")
        ),
    ] = "bfloat16",
    gguf: Annotated[
        Optional[str],
        option(
            "--gguf",
            "Also a file for llama.cpp and Ollama: f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.",
            RUN,
            "TYPE",
            completion.words("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"),
        ),
    ] = None,
    llama_cpp: Annotated[
        Optional[Path], option("--llama-cpp", "A checkout of llama.cpp; else what is on the PATH.", RUN, "DIR")
    ] = None,
    adapter_only: Annotated[
        bool, option("--adapter-only", "Do not merge: RUN/adapter-only, for vLLM's and PEFT's loaders.", RUN)
    ] = False,
    trust_remote_code: Annotated[
        bool, option("--trust-remote-code", "Run Python code that comes with the base.", RUN)
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its 16-bit base: a plain model for vLLM, llama.cpp, transformers."""
    result = api_share.merge(
        source,
        base=base,
        output=output,
        dtype=dtype,
        gguf=gguf,
        llama_cpp=llama_cpp,
        adapter_only=adapter_only,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    if as_json:
        console.print_json(result.to_dict())
    elif not quiet:
        console.print_facts("exported" if adapter_only else "merged", result.facts())


def push_to_hub(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|DIR", help="A run, an adapter or a merged model.", autocompletion=completion.runs),
    ],
    repo: Annotated[str, option("--repo", "Where to: user/name.", RUN)],
    merged: Annotated[bool, option("--merged", "The run's merged model instead of its adapter.", RUN)] = False,
    public: Annotated[bool, option("--public", "Visible to everybody; private otherwise.", RUN)] = False,
    dry_run: Annotated[bool, option("--dry-run", "List the files and show the card; send nothing.", RUN)] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Publish an adapter or a merged model with a card made from the run."""
    from sampo_cli.hub import PushPlan
    from sampo_cli.tables import print_push_plan

    result = api_share.push_to_hub(source, repo=repo, merged=merged, public=public, dry_run=dry_run)
    if as_json:
        console.print_json(result.to_dict())
    elif isinstance(result, PushPlan):
        print_push_plan(result)
    elif not quiet:
        console.print_facts("published", result.to_dict())
