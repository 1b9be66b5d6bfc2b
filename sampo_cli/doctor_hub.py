"""What `sampo doctor` finds of the Hub: whether it answers soon, and who is logged in. The token is never shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http import HTTPStatus

from sampo_cli.doctor_machine import Check
from sampo_cli.errors import HubError
from sampo_cli.remote import hub_errors

SECONDS = 3.0
"""For an answer: looking up the address, connecting, reading."""


def check_hub(offline: bool) -> Iterator[Check]:
    """Ask who is logged in, which tells both.

    Args:
        offline: do not ask.
    """
    from huggingface_hub import constants, get_token, is_offline_mode

    name = f"Hub ({constants.ENDPOINT})"
    if offline or is_offline_mode():
        reason = "--offline" if offline else "HF_HUB_OFFLINE is set"
        yield Check(name, "ok", f"not asked: {reason}; models come from folders and the cache")
        return
    token = get_token()
    try:
        user = _within(SECONDS, token)
    except HubError as error:
        advice = f"{error.hint}; without a network: --offline here, HF_HUB_OFFLINE=1 elsewhere"
        yield Check(name, "fail", error.message, advice)
        return
    if token:
        yield Check(name, "ok", f"reachable, logged in as {user}")
    else:
        advice = "for gated and private models and for pushing: `hf auth login`, or set HF_TOKEN"
        yield Check(name, "warn", "reachable, not logged in", advice)


def _within(seconds: float, token: str | None) -> str:
    """The Hub's answer in time: looking up an address has no limit of its own, so it is not waited for.

    Raises:
        HubError: no answer, or no good one.
    """
    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            answer.append(_user(seconds, token))
        except Exception as error:
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    with hub_errors("the Hub"):
        if not answer:
            raise TimeoutError(f"no answer within {seconds:g} seconds")
        if isinstance(answer[0], Exception):
            raise answer[0]
    return answer[0]


def _user(seconds: float, token: str | None) -> str:
    """Who the token belongs to; nobody without one, which the Hub answers with 401."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=token or False)
    response = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=seconds)
    if token is None and response.status_code == HTTPStatus.UNAUTHORIZED:
        return ""
    hf_raise_for_status(response)
    return str(response.json().get("name", "?"))
