"""What the processor can do, as Linux lists it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# XNNPACK adds the products of float16 in float16 where it can: AVX-512 FP16, and ARM's FEAT_FP16.
NATIVE_FLOAT16 = {"avx512_fp16", "asimdhp"}


def features() -> frozenset[str]:
    """Of the first processor; none where there is no such list."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(line.split(":", 1)[1].split())


def native_float16() -> bool:
    return not NATIVE_FLOAT16.isdisjoint(features())


def machine() -> dict[str, Any]:
    """What a measured time belongs to."""
    return {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()}
