"""sampo: preference-tune a chat model with SamPO on one GPU, without making it verbose.

The commands are here as functions of the same names and parameters; `eval` is `evaluate`. They return what the command
prints, and raise a `SampoError` where it would end with an exit code. Importing this loads no torch.
"""

from sampo_cli.api_files import cache_clear, cache_list, data, doctor, methods, recipes, report, runs
from sampo_cli.api_models import chat, evaluate
from sampo_cli.api_share import merge, push_to_hub
from sampo_cli.api_sweep import Sweep, sweep
from sampo_cli.api_train import Run, train
from sampo_cli.errors import Interrupted, SampoError

__version__ = "0.1.0"

__all__ = [
    "Interrupted",
    "Run",
    "SampoError",
    "Sweep",
    "cache_clear",
    "cache_list",
    "chat",
    "data",
    "doctor",
    "evaluate",
    "merge",
    "methods",
    "push_to_hub",
    "recipes",
    "report",
    "runs",
    "sweep",
    "train",
]
