"""sampo: preference-tune a chat model with SamPO on one GPU, without making it verbose.

The commands are here as functions of the same names and parameters; `eval` is `evaluate`. They return what the command
prints, and raise a `SampoError` where it would end with an exit code. Importing this loads no torch.
"""

from sampo_cli.api_files import cache_clear, cache_list, data, methods, recipes, report, runs
from sampo_cli.api_models import chat, evaluate, merge, push_to_hub
from sampo_cli.api_train import Run, train
from sampo_cli.errors import Interrupted, SampoError

__version__ = "0.1.0"

__all__ = [
    "Interrupted",
    "Run",
    "SampoError",
    "cache_clear",
    "cache_list",
    "chat",
    "data",
    "evaluate",
    "merge",
    "methods",
    "push_to_hub",
    "recipes",
    "report",
    "runs",
    "train",
]
