"""What the processor can do, as Linux lists it, and how many of them there are."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
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


def available(root: Path = Path("/")) -> int:
    """How many processors this process may use: by its affinity, and by the limits of its control groups.

    root: of the file system that Linux shows those in.
    """
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([n, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time, by each control group that this process is in, of version 2 or 1."""
    listing = root / "proc" / "self" / "cgroup"
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys" / "fs" / "cgroup" / controllers
        # In a container the name may be the host's; its own group is then at the mount.
        for folder in (mount / name.strip("/"), *(mount / parent for parent in Path(name.strip("/")).parents)):
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
            try:
                quota, period = (word for file in files for word in (folder / file).read_text().split())
            except (OSError, ValueError):
                continue
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def machine() -> dict[str, Any]:
    """What a measured time belongs to. cpus: of the machine; available: to this process."""
    cpus = {"cpus": os.cpu_count(), "available": available()}
    return {"system": platform.platform(), "processor": platform.machine()} | cpus
