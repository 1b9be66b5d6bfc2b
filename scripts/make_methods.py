"""Writes docs/methods.md from the table of methods: formulas, defaults, reductions, papers, citations.

Run it after a change of the table; a test compares the page with what this would write.
"""

from __future__ import annotations

from pathlib import Path

from sampo_cli.method_table import METHODS, Method
from scripts.make_reference import code, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"

HEADER = """# Methods

<!-- Written by scripts/make_methods.py. Do not edit: change sampo_cli/method_table.py, then run the script. -->

A method is a loss with a reduction and defaults. `sampo` is `dpo` on down-sampled responses; `dpo-sft` and `cpo-simpo`
are `dpo` and `simpo` with a likelihood term. The loss of a step is the mean over its pairs. Defaults apply where recipe
and flags say nothing; learning rates are for LoRA, 10 to 50 times those of full fine-tuning.

```bash
sampo train --model my-model --data pairs.jsonl --method ipo --set method.reduction=sample
sampo train --model my-model --data pairs.jsonl --method simpo --set method.sft_weight=0.05
```
"""

NOTATION = """## Notation

| symbol | meaning |
| --- | --- |
| y_w, y_l | the chosen and the rejected response to a prompt x |
| T_w, T_l | how many tokens they have |
| r(y, t) | log pi_theta(y_t) - log pi_ref(y_t), the log-ratio of token t, both given x and y_1 ... y_(t-1) |
| c, r | the log-ratios of y_w and of y_l, each reduced to one number by `method.reduction` |
| w, l | the same of log pi_theta alone, for methods without a reference |
| NLL(y_w) | -log pi_theta(y_w) / T_w, over the whole chosen response whatever the reduction |

Rewards in `metrics.jsonl` are beta * c and beta * r, or beta * w and beta * l. `tdpo` adds beta times the KL of the
response to each, because its model of preferences does."""

REDUCTIONS = """## Reductions

| `method.reduction` | weight of a token | |
| --- | --- | --- |
| `sum` | 1 | every token counts: DPO |
| `sample` | 1 at min(T_w, T_l) drawn positions, else 0 | both responses count with as many tokens: SamPO |
| `expected` | min(T_w, T_l) / T | what `sample` gives on average, without its noise |
| `average` | (T_w + T_l) / 2T | the mean times the pair's mean length |
| `mean` | 1 / T | per token |

`method.draws: K` averages K independent draws of `sample` in one step, which divides the variance of the score by K.
`method.sampling: independent` gives the reference a draw of its own, as the code does that was released with SamPO.
A reduction that has no meaning for a method is refused, and so is an option that its loss does not have."""

TERMS = """## The likelihood term

`method.sft_weight` adds that many times NLL(y_w) to the loss of any method: a mean over each pair's tokens, then over
pairs, so that a long response does not outweigh a short one. It is 0 unless a method's defaults say otherwise."""

MEMORY = {
    "all steps": "d is a mean over all pairs of all training steps so far. Evaluations do not move it; it is in the "
    "checkpoint. The released code counts the current batch too, and moves it during evaluations.",
    "last step": "K_w and K_l come from the whole step before and are 0 in the first one, where policy and reference "
    "agree. So they do not depend on how a step is cut into micro-batches, and they carry no gradient. They are in the "
    "checkpoint. The released code takes them from the batch at hand.",
}


def number(value: float) -> str:
    return f"{value:g}"


def defaults(method: Method) -> str:
    values = [(f"{section}.{key}", value) for section, keys in method.defaults.items() for key, value in keys.items()]
    return "; ".join(f"{key} {number(value)}" for key, value in values)


def overview() -> str:
    rows = []
    for method in METHODS.values():
        reference = "yes" if method.needs_reference else "no"
        link = f"[{code(method.name)}](#{method.name})"
        rows.append((link, code(method.reduction), reference, code(defaults(method)), method.paper))
    return table(("method", "reduction", "reference", "defaults", "paper"), rows)


def section(method: Method) -> str:
    """What there is to know of one method."""
    rows = [
        ("paper", method.paper),
        ("reference", "yes" if method.needs_reference else "none is computed"),
        ("reduction", ", ".join(map(code, [method.reduction, *sorted(set(method.reductions) - {method.reduction})]))),
        ("defaults", code(defaults(method))),
    ]
    for key, (low, high) in method.usual.items():
        unit = " times beta" if key == "gamma" else ""
        rows.append((f"usual {code(f'method.{key}')}", f"{number(low)} to {number(high)}{unit}"))
    reasons: dict[str, list[str]] = {}
    for reduction, reason in method.refused.items():
        reasons.setdefault(reason, []).append(code(reduction))
    rows += [(f"refused: {', '.join(names)}", reason) for reason, names in reasons.items()]
    parts = [f"## {method.name}", f"```text\n{method.formula}\n```", table(("", ""), rows)]
    if method.needs_kl:
        parts.append("The KL needs the reference's whole distribution at every response token, so no stored log-probs.")
    if method.memory in MEMORY:
        parts.append(MEMORY[method.memory])
    return "\n\n".join([*parts, f"```bibtex\n{method.citation}\n```"])


def page() -> str:
    """The whole page."""
    parts = [HEADER, overview(), NOTATION, REDUCTIONS, TERMS, *(section(method) for method in METHODS.values())]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
