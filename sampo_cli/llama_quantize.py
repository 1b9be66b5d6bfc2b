"""`python -m sampo_cli.llama_quantize FROM TO TYPE`: llama.cpp's quantizer out of llama-cpp-python's library.

The same arguments as llama.cpp's own `llama-quantize`, for machines that have the Python package and not the programs.
A process of its own, since the library ends the process where it cannot go on.
"""

from __future__ import annotations

import ctypes
import sys


def quantize(source: str, target: str, kind: str) -> int:
    """0 if `target` was written from `source`, a GGUF file with 16- or 32-bit weights, rounded to `kind`."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    llama_cpp.llama_backend_init()
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    raise SystemExit(quantize(*sys.argv[1:]))
