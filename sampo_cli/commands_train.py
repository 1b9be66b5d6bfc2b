"""The command that everything is about: `sampo train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

from sampo_cli import api_train, completion, console, ranks
from sampo_cli.options import DATA, MODEL, RUN, TRAINING, Debug, Json, Quiet, Set, asked_for, option

MethodName = Annotated[
    Optional[str],
    option(
        "--method",
        "One of `sampo methods`; sampo if not given.",
        TRAINING,
        offers=completion.words(*completion.METHODS),
    ),
]
Trackers = Annotated[
    Optional[list[str]],
    option(
        "--report-to",
        "tensorboard, wandb, mlflow, trackio; repeatable.",
        RUN,
        "TRACKER",
        completion.choices("output.report_to"),
    ),
]
CacheReference = Annotated[
    Optional[str],
    option(
        "--cache-reference",
        "Keep the reference's log-probs on disk.",
        TRAINING,
        "auto|on|off",
        completion.choices("train.cache_reference"),
    ),
]


def train(
    recipe: Annotated[
        Optional[str], option("--recipe", "A shipped recipe or a YAML file.", RUN, "NAME|PATH", completion.recipes)
    ] = None,
    model: Annotated[Optional[str], option("--model", "Base model: a Hub name or a folder.", MODEL)] = None,
    data: Annotated[Optional[list[str]], option("--data", "Pairs: Hub name, file, folder; repeatable.", DATA)] = None,
    method: MethodName = None,
    output: Annotated[Optional[str], option("--output", "The run's folder.", RUN, "DIR")] = None,
    adapter: Annotated[
        Optional[str], option("--adapter", "Go on from this LoRA adapter.", MODEL, offers=completion.runs)
    ] = None,
    iterations: Annotated[Optional[int], option("--iterations", "Rounds with a renewed reference.", TRAINING)] = None,
    epochs: Annotated[Optional[float], option("--epochs", "Passes over the pairs.", TRAINING)] = None,
    max_steps: Annotated[Optional[int], option("--max-steps", "Optimizer steps, instead of epochs.", TRAINING)] = None,
    learning_rate: Annotated[Optional[float], option("--learning-rate", "Peak learning rate.", TRAINING)] = None,
    beta: Annotated[Optional[float], option("--beta", "Strength of the reference.", TRAINING)] = None,
    batch_pairs: Annotated[Optional[int], option("--batch-pairs", "Pairs per optimizer step.", TRAINING)] = None,
    max_length: Annotated[Optional[int], option("--max-length", "Tokens of prompt plus response.", DATA)] = None,
    lora_r: Annotated[Optional[int], option("--lora-r", "Rank of the adapter.", MODEL)] = None,
    lora_alpha: Annotated[Optional[int], option("--lora-alpha", "Scale of the adapter.", MODEL)] = None,
    quantization: Annotated[
        Optional[str],
        option("--quantization", "Of the base.", MODEL, "nf4|int8|none", completion.choices("model.quantization")),
    ] = None,
    eval_fraction: Annotated[Optional[float], option("--eval-fraction", "Share of pairs held out.", DATA)] = None,
    save_every: Annotated[Optional[int], option("--save-every", "Steps between checkpoints.", RUN)] = None,
    resume: Annotated[
        Optional[Path], option("--resume", "Go on with a run or from its checkpoint.", RUN, offers=completion.runs)
    ] = None,
    seed: Annotated[Optional[int], option("--seed", "Of everything random.", TRAINING)] = None,
    report_to: Trackers = None,
    cache_reference: CacheReference = None,
    dry_run: Annotated[bool, option("--dry-run", "Say what would happen; load no weights.", RUN)] = False,
    gpu_memory: Annotated[
        Optional[str], option("--gpu-memory", "With --dry-run: for a card of so much memory.", RUN, "24GB")
    ] = None,
    num_processes: Annotated[
        Optional[int], option("--num-processes", "Processes, one for each GPU.", RUN, "N", min=1)
    ] = None,
    accelerate_config: Annotated[
        Optional[str], option("--accelerate-config", "How they work together: an accelerate config.", RUN, "NAME|PATH")
    ] = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train an adapter on preference pairs.

    sampo train --model meta-llama/Meta-Llama-3-8B-Instruct --data Intel/orca_dpo_pairs --method sampo
    """
    run = api_train.train(**asked_for(locals()))
    if not ranks.speaks():
        return
    if as_json:
        console.print_json(run.to_dict())
    elif dry_run:
        from sampo_cli.tables import print_dry_run

        print_dry_run(run.summary)
    elif not quiet:
        console.print_summary(run.summary, run.folder)
