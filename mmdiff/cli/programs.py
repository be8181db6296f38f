"""Compiled programs kept on disk, so that the second `mmdiff sample` of a run starts in seconds.

A folder of its own for each kind of machine: programs for a CPU use what that very CPU can do.
"""

import hashlib
import os
import platform
from pathlib import Path

FOLDER = "programs"


def keep_programs(workdir: str | Path) -> None:
    """Read and write WORKDIR/programs, unless JAX_COMPILATION_CACHE_DIR names another folder ("": none at all)."""
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(workdir) / FOLDER / machine()))
    if folder and Path(workdir).is_dir():
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def machine() -> str:
    """A short name for the processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        told = [platform.processor()]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:12]
