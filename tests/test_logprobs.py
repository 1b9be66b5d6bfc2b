"""Chunked log-probs against the plain computation, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from sampo_cli import logprobs
from sampo_cli.logprobs import Head, chunk_rows, token_kl, token_logps


def plain(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 4 * 11, 2**25])
@pytest.mark.parametrize(
    "head",
    [
        Head(torch.randn(11, 5)),
        Head(torch.randn(11, 5), bias=torch.randn(11)),
        Head(torch.randn(11, 5), scale=0.25),
        Head(torch.randn(11, 5), softcap=3.0, scale=2.0),
    ],
    ids=["plain", "bias", "scale", "softcap"],
)
def test_values_and_gradients(head: Head, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CPU_CHUNK", chunk)
    monkeypatch.setattr(logprobs, "LEAST_ROWS", 1)
    torch.manual_seed(0)
    ours, theirs = (torch.randn(9, 5, requires_grad=True) for _ in range(2))
    theirs.data.copy_(ours.data)
    targets, weights = torch.randint(0, 11, (9,)), torch.randn(9)
    value, expected = token_logps(ours, targets, head), plain(theirs, targets, head)
    torch.testing.assert_close(value, expected, atol=2e-6, rtol=0)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=5e-6, rtol=0)


@pytest.mark.parametrize("chunk", [4 * 11, 2**25])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_kl_values_and_gradients(softcap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CPU_CHUNK", chunk)
    monkeypatch.setattr(logprobs, "LEAST_ROWS", 1)
    torch.manual_seed(0)
    head = Head(torch.randn(11, 5), softcap=softcap, scale=0.7)
    ours, theirs = (torch.randn(9, 5, requires_grad=True) for _ in range(2))
    theirs.data.copy_(ours.data)
    reference, weights = torch.randn(9, 5), torch.randn(9)

    def log_softmax(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ head.weight.T * head.scale
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    expected = torch.nn.functional.kl_div(
        log_softmax(theirs), log_softmax(reference), reduction="none", log_target=True
    )
    value = token_kl(ours, reference, head)
    torch.testing.assert_close(value, expected.sum(-1), atol=2e-6, rtol=0)
    (value * weights).sum().backward()
    (expected.sum(-1) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=5e-6, rtol=0)
    assert token_kl(ours, ours.detach(), head).abs().max() < 1e-6


def test_a_flat_distribution_over_a_large_vocabulary_does_not_overflow_in_float16() -> None:
    torch.manual_seed(0)
    weight = torch.randn(100_000, 4)
    hidden = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    value = token_logps(hidden, torch.tensor([0, 7]), Head(weight.half()))
    torch.testing.assert_close(value, torch.full((2,), -math.log(100_000)))
    value.sum().backward()
    torch.testing.assert_close(hidden.grad.float(), weight[[0, 7]] - weight.mean(0), atol=2e-3, rtol=0)


def test_gradients_of_sure_tokens_keep_their_digits_in_bfloat16() -> None:
    # softmax = (1 - d, d) with d = exp(-9) / (1 + exp(-9)): the gradient of the first log-prob is d * (w0 - w1).
    weight = torch.tensor([[9.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    token_logps(hidden, torch.tensor([0]), Head(weight)).sum().backward()
    assert hidden.grad.item() == pytest.approx(9 / (1 + math.exp(9)), rel=1e-2)


def test_chunks_fit_the_cache_and_are_no_fewer_than_what_pays_for_reading_the_weights() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(1024, cpu) == 4096  # 2^22 logits
    assert chunk_rows(128_256, cpu) == 128


def test_nothing_is_kept_for_backward_without_gradients() -> None:
    value = token_logps(torch.randn(3, 5), torch.tensor([0, 1, 2]), Head(torch.randn(11, 5)))
    assert not value.requires_grad
