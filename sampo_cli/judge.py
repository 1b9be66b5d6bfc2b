"""Answers for alpaca_eval, and its verdict on them: files in its format, its own functions for the win rates.

alpaca_eval is imported only where a judge is asked for. It reads API keys from the environment itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sampo_cli.disk import write_text
from sampo_cli.errors import SampoError, UsageError
from sampo_cli.remote import first_line

LENGTH_CONTROL = "length_controlled_minimal"
"""alpaca_eval's model of the win rate without the difficulty of AlpacaEval's own 805 instructions, as these are others.
"""


def write_answers(path: Path, instructions: Sequence[str], outputs: Sequence[str], generator: str) -> None:
    """A JSON file that `alpaca_eval --model_outputs` and `--reference_outputs` take."""
    rows = [
        {"instruction": instruction, "output": output, "generator": generator}
        for instruction, output in zip(instructions, outputs, strict=True)
    ]
    write_text(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def check_judge(config: str) -> None:
    """Refuse a judge that cannot be asked, before any model is loaded.

    Raises:
        UsageError: alpaca_eval is not installed.
    """
    if find_spec("alpaca_eval") is None:
        raise UsageError(
            f"--judge {config}: alpaca_eval is not installed",
            hint="pip install alpaca-eval, and set the API key that the judge needs (OPENAI_API_KEY)",
        )


def ask_judge(config: str, answers: Path, reference: Path, folder: Path) -> dict[str, Any]:
    """Win rates of `answers` over `reference`, in percent.

    Args:
        config: an annotator of alpaca_eval, such as weighted_alpaca_eval_gpt4_turbo, or a folder with a configs.yaml.
        answers, reference: files that `write_answers` wrote.
        folder: where the judge's annotations go.

    Returns:
        alpaca_eval's metrics, `win_rate` and `length_controlled_winrate` among them; the latter is None, and `note`
        says why, where alpaca_eval could not fit its model of length.

    Raises:
        SampoError: the judge could not be asked, or has no annotator of that name.
    """
    import alpaca_eval
    from alpaca_eval.metrics import get_length_controlled_winrate

    folder.mkdir(parents=True, exist_ok=True)
    name = str(Path(config).resolve()) if Path(config).is_dir() else config
    try:
        with redirect_stdout(sys.stderr):
            leaderboard, annotations = alpaca_eval.evaluate(
                model_outputs=answers,
                reference_outputs=reference,
                annotators_config=name,
                output_path=folder,
                precomputed_leaderboard=None,
                is_cache_leaderboard=False,
                is_return_instead_of_print=True,
                fn_metric="get_winrate",
                sort_by="win_rate",
                caching_path=None,  # 0.6.6 cannot read its own whole-number verdicts back with pandas 3
            )
    except Exception as error:  # whatever a judge's client raises
        raise SampoError(
            f"the judge '{config}' could not be asked: {first_line(error)}",
            hint=f"check its name and its API key; the answers are in {answers.parent}",
        ) from error
    metrics = {key: _plain(value) for key, value in leaderboard.iloc[0].to_dict().items()}
    try:
        controlled = get_length_controlled_winrate(annotations, glm_name=LENGTH_CONTROL, save_weights_dir=None)
    except Exception as error:  # its model of length needs a file from the Hub, and enough answers of each outcome
        return {**metrics, "length_controlled_winrate": None, "note": f"no length control: {first_line(error)}"}
    return {**metrics, **{key: _plain(value) for key, value in controlled.items()}}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
