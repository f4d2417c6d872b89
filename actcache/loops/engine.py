"""Loops written in the language of LLVM, compiled for this processor in some milliseconds.

Where llvmlite is not installed (`pip install 'actcache[fast]'`) there are none, and NumPy does the same work.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

INTEGER, POINTER = ctypes.c_int64, ctypes.c_void_p


@cache
def features() -> dict[str, bool] | None:
    """What this processor can do, by LLVM's names; None without llvmlite."""
    try:
        from llvmlite import binding
    except ImportError:
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.get_host_cpu_features()


def text_of(name: str) -> str:
    """A file of loops."""
    return files("actcache.loops").joinpath(name).read_text()


class Engine:
    """Compiled code. It may call `pread` and `madvise` where the system has them."""

    def __init__(self, text: str) -> None:
        from llvmlite import binding

        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=2
        )
        if hasattr(os, "preadv"):
            system = ctypes.CDLL(None)
            for name in ("pread", "madvise"):
                binding.add_symbol(name, ctypes.cast(system[name], ctypes.c_void_p).value)
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(text), machine)
        self._engine.finalize_object()

    def loop(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        """A function of it; other Python threads run while it does."""
        found = ctypes.CFUNCTYPE(result, *arguments)(self._engine.get_function_address(name))
        found.engine = self._engine  # type: ignore[attr-defined]  # it owns the code
        return found
