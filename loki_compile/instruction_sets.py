"""What Inductor asks of the C++ compiler before its first loop, asked once instead of three times.

For each instruction set that the processor has, Inductor compiles a program and loads it, 2 s each,
to see whether the compiler knows it and PyTorch has vector functions for it; then it takes the
widest, which comes first. Where the widest passes, the others, which are parts of it, need not be
asked. The program is Inductor's own and stays in its cache.

Private API, checked on torch 2.13: `cpu_vec_isa`. Where it is another, or the widest does
not pass, Inductor asks for itself.
"""

from __future__ import annotations

import functools
from typing import Any


def options() -> dict[str, Any]:
    """Inductor's options for a graph on the CPU, by which it asks no more than is left to ask:
    none where its configuration says already what the compiler can do."""
    from torch._inductor import config

    if config.cpp.vec_isa_ok is not None or not widest_passes():
        return {}
    return {"cpp.vec_isa_ok": True}


@functools.cache
def widest_passes() -> bool:
    """Whether the compiler and PyTorch serve the widest instruction set of this processor, by
    Inductor's own program; False where it has none that is known here."""
    from torch._inductor import cpu_vec_isa

    try:
        here = cpu_vec_isa.x86_isa_checker()
        known = cpu_vec_isa.supported_vec_isa_list
        able = [isa for isa in known if all(name in here for name in str(isa).split())]
        # Not Inductor's own object, which has other flags while another thread asks it.
        return bool(able) and type(able[0])().check_build(cpu_vec_isa.VecISA._avx_code)
    except AttributeError:
        return False
