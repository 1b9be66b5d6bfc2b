"""What `sampo doctor` finds of the device: torch, cards, bfloat16, bitsandbytes, attention, kernels.

Each is tried and not only looked up: a layer is quantized and back, attention is compiled and run. Everything is
imported inside the check that needs it, as it may be missing or broken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sampo_cli.doctor_machine import Check, pin
from sampo_cli.errors import ModelError
from sampo_cli.remote import first_line

if TYPE_CHECKING:
    import torch

SMI_FIELDS = "name,driver_version"
SMI_SECONDS = 10

NF4_ERROR = (0.08, 0.11)
"""Relative L2 error of normally distributed weights after NF4 and back, in blocks of 64: 0.092, by any code."""

INT8_ERROR = 0.02
"""Largest of a product with int8 weights; 0.007 is usual."""

FREE_SHARE = 0.8


def check_torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken library raises OSError, a missing one ImportError
        reinstall = pin("torch").replace("install", "install --force-reinstall")
        yield Check("torch", "fail", f"cannot be imported: {first_line(error)}", reinstall)
        return
    hip = getattr(torch.version, "hip", None)
    build = f"with CUDA {torch.version.cuda}" if torch.version.cuda else f"with ROCm {hip}" if hip else "without CUDA"
    yield Check("torch", "ok", f"{torch.__version__}, built {build}, {torch.get_num_threads()} CPU threads")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        yield from _cards()
    else:
        yield _no_card(torch.version.cuda, [str(warning.message) for warning in said])


def driver() -> list[str]:
    """A line for each card that the NVIDIA driver knows, with the driver's version; none without one."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _no_card(cuda: str | None, said: list[str]) -> Check:
    """Why torch has no card to compute on."""
    cards = driver()
    if not cards:
        advice = "for more than small models: a machine with an NVIDIA card, and its driver (`nvidia-smi` lists it)"
        return Check("GPU", "warn", "none: runs are on the CPU", advice)
    here = f"{len(cards)} with driver ({'; '.join(cards)})"
    if cuda is None:
        advice = f"{pin('torch')} --force-reinstall, from a build with CUDA: pytorch.org/get-started"
        return Check("GPU", "fail", f"{here}, but this torch is built without CUDA", advice)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Check("GPU", "warn", f"{here}, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    reason = said[0].splitlines()[0][:200] if said else "torch finds none of them"
    advice = f"a driver that knows CUDA {cuda}, or a build of torch for an older CUDA: pytorch.org/get-started"
    return Check("GPU", "fail", f"{here}, but {reason}", advice)


def _cards() -> Iterator[Check]:
    """Each card with its memory, and a product computed on the one that runs take."""
    import torch

    known = driver()
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        version = known[index].rpartition(", ")[2] if len(known) == torch.cuda.device_count() else "unknown"
        found = (
            f"{card.name}, {free:.1f} of {total:.1f} GiB free, compute capability {card.major}.{card.minor}, "
            f"driver {version}"
        )
        if free < FREE_SHARE * total:
            advice = "another process has the rest: `nvidia-smi` lists it"
            yield Check(f"GPU {index}", "warn", found, advice)
        else:
            yield Check(f"GPU {index}", "ok", found)
    try:
        here = torch.ones(64, 64, device="cuda")
        works = (here @ here).sum().item() == 64.0**3
        reason = "" if works else "a product came out wrong"
    except Exception as error:
        reason = first_line(error)
    if reason:
        built = ", ".join(torch.cuda.get_arch_list())
        yield Check("GPU kernels", "fail", f"{reason} (torch is built for {built})", "pytorch.org/get-started")


def check_dtype() -> Iterator[Check]:
    from sampo_cli.model import pick_device, pick_dtype

    device = pick_device()
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    found = f"{dtype} is what model.dtype=auto takes on {device.type}"
    if dtype == "float16":
        yield Check("bfloat16", "warn", f"the card has none: {found}", "float16 may overflow; watch for skipped steps")
    else:
        yield Check("bfloat16", "ok", found)


def check_bitsandbytes() -> Iterator[Check]:
    """Quantize a layer to NF4 and back, multiply with one in int8, and on CUDA take a step of the 8-bit optimizer."""
    advice = f"{pin('bitsandbytes')}; or train on an unquantized base: --quantization none"
    try:
        import bitsandbytes

        from sampo_cli.model import pick_device

        device = pick_device()
        nf4, int8 = quantization_errors(device)
        if device.type == "cuda":
            _optimizer_step(device)
    except Exception as error:  # its native library fails in any way
        found = f"does not work: {type(error).__name__}: {first_line(error)}"
        yield Check("bitsandbytes", "fail", found, advice)
        return
    optimizer = ", 8-bit AdamW steps" if device.type == "cuda" else ""
    found = f"{bitsandbytes.__version__} on {device.type}: NF4 and back within {nf4:.1%}, int8 {int8:.1%}{optimizer}"
    if NF4_ERROR[0] < nf4 < NF4_ERROR[1] and int8 < INT8_ERROR:
        yield Check("bitsandbytes", "ok", found)
    else:
        expected = f"{NF4_ERROR[0]:.0%} to {NF4_ERROR[1]:.0%}, and at most {INT8_ERROR:.0%}"
        yield Check("bitsandbytes", "fail", f"{found}; expected {expected}", advice)


def quantization_errors(device: torch.device) -> tuple[float, float]:
    """Relative L2 errors of a layer's weights after NF4 and back, and of its output with int8 weights."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator)
    inputs = torch.randn(8, 256, generator=generator)
    four = Linear4bit(256, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    eight = Linear8bitLt(256, 256, bias=False, has_fp16_weights=False)
    for layer in (four, eight):
        layer.load_state_dict({"weight": weight})
        layer.to(device)
    back = dequantize_4bit(four.weight.data, four.weight.quant_state).float().cpu()
    product = eight(inputs.to(device, torch.float16 if device.type == "cuda" else torch.float32)).float().cpu()
    return _relative(back, weight), _relative(product, inputs @ weight.T)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _optimizer_step(device: torch.device) -> None:
    import torch
    from bitsandbytes.optim import PagedAdamW8bit

    weights = torch.nn.Parameter(torch.ones(64, 64, device=device))
    optimizer = PagedAdamW8bit([weights], lr=0.1)
    weights.sum().backward()
    optimizer.step()
    torch.cuda.synchronize()
    if not bool((weights < 1).all()):
        raise RuntimeError("a step of PagedAdamW8bit did not lower its weights")


def check_attention() -> Iterator[Check]:
    """Compile and run flex attention as a run would, and see whether sdpa has its flash kernel."""
    from sampo_cli.model import pick_device

    if pick_device().type != "cuda":
        yield Check("attention", "ok", "sdpa; flex attention is for CUDA")
        return
    from sampo_cli.flex import flex_failure

    flash = "flash" if _flash_runs() else "no flash"
    if reason := flex_failure(_small_model()):
        advice = "shared rows are computed with sdpa, slower; compiling needs a C compiler and Python's headers"
        yield Check("attention", "warn", f"sdpa ({flash}); {reason}", advice)
    else:
        yield Check("attention", "ok", f"flex attention compiles and agrees with sdpa; sdpa ({flash})")


def _flash_runs() -> bool:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.float16)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            warnings.simplefilter("ignore")
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    except RuntimeError:
        return False
    return True


def check_kernels() -> Iterator[Check]:
    """Run Liger's kernels on a small model and see that they compute the same."""
    from importlib.util import find_spec

    from sampo_cli.kernels import INSTALL, use_kernels
    from sampo_cli.model import pick_device

    if pick_device().type != "cuda":
        yield Check("kernels", "ok", "none are used on the CPU")
    elif find_spec("liger_kernel") is None:
        yield Check("kernels", "warn", "Liger is not installed: steps are slower", INSTALL)
    else:
        try:
            yield Check("kernels", "ok", use_kernels(_small_model(), "liger"))
        except ModelError as error:
            yield Check(
                "kernels", "warn", error.message, "steps are slower without; --set model.kernels=none is silent"
            )


def _small_model() -> Any:
    """A random Llama of one layer on the card, in its compute dtype."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from sampo_cli.generate import own_draws
    from sampo_cli.model import pick_device, pick_dtype

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    device = pick_device()
    with own_draws(device, 0):
        return AutoModelForCausalLM.from_config(config, dtype=pick_dtype("auto", device)).to(device)
