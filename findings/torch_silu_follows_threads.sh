#!/usr/bin/env bash
# Expected: an operator that works element by element gives each element the same bits, however many threads share the
# work. Sums may depend on the number of threads; silu(x) of one number should not.
# Seen, torch 2.13.0 on x86-64: sigmoid and SiLU do depend on it. Each thread computes full vectors of its part, and what
# is left at the end of the part by another formula, whose last bit may differ. exp, tanh, gelu, log1p, sin do not:
#
#     silu:    1 thread against 3 differ in 88 of 5,001,275 elements
#     sigmoid: 1 thread against 3 differ in 94 of 5,001,275 elements
#     exp:     1 thread against 3 differ in 0 of 5,001,275 elements
#
# (with AVX-512; ATEN_CPU_CAPABILITY=avx2 gives fewer, and other ones)
#
# So: a float32 reference of a network with a SwiGLU MLP is not the same to the bit on machines with other numbers of
# cores, though every product in it is; and the same token may get other bits at another place in a batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

tensors = [4 * torch.randn(100_001 + i, generator=torch.Generator().manual_seed(i)) for i in range(50)]


def by(threads, function):
    torch.set_num_threads(threads)
    return [function(x) for x in tensors]


differ = {}
for name, function in (("silu", F.silu), ("sigmoid", torch.sigmoid), ("exp", torch.exp)):
    one, three = by(1, function), by(3, function)
    assert all(map(torch.equal, one, by(1, function)))
    differ[name] = sum(int((a != b).sum()) for a, b in zip(one, three))
    n = sum(map(len, tensors))
    print(f"{name + ':':8} 1 thread against 3 differ in {differ[name]} of {n:,} elements")

if not (differ["silu"] and differ["sigmoid"]) or differ["exp"]:
    sys.exit("no longer so: the bits of SiLU and sigmoid do not follow the number of threads, or those of exp do")
PYTHON
