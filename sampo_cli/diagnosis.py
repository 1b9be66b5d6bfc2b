"""`sampo doctor`: every check in turn. One that breaks is a failure that is told, and the next one follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sampo_cli import doctor_device as device
from sampo_cli import doctor_machine as machine
from sampo_cli.doctor_hub import check_hub
from sampo_cli.doctor_machine import Check
from sampo_cli.remote import first_line


@dataclass(frozen=True)
class Diagnosis:
    """What all checks found, in order. Each has `name`, `state` (ok, warn, fail), `found` and `advice`."""

    checks: list[Check]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed; warnings do not count."""
        return [check.name for check in self.checks if check.state == "fail"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"ok": not self.failed, "checks": [asdict(check) for check in self.checks]}


def diagnose(*, offline: bool = False) -> Diagnosis:
    """Check everything.

    Args:
        offline: leave the network alone.
    """
    checks: dict[str, Callable[[], Iterable[Check]]] = {
        "Python": machine.check_python,
        "packages": machine.check_packages,
        "optional packages": machine.check_optional,
        "torch": device.check_torch,
        "bfloat16": device.check_dtype,
        "bitsandbytes": device.check_bitsandbytes,
        "attention": device.check_attention,
        "kernels": device.check_kernels,
        "memory": machine.check_memory,
        "disks": machine.check_disks,
        "Hub": partial(check_hub, offline),
    }
    return Diagnosis([result for name, check in checks.items() for result in _results(name, check)])


def _results(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(check())
    except Exception as error:  # a broken package can raise anything
        found = f"cannot be checked: {type(error).__name__}: {first_line(error)}"
        return [Check(name, "fail", found, "mend what failed above it, then run sampo doctor again")]
