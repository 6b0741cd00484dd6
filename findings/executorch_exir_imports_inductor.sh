#!/usr/bin/env bash
# Expected: executorch's exporter, which makes programs for devices, imports what it lowers with. torch's inductor, a
# compiler for the machine one is on, is loaded when something is compiled, as torch.compile itself does it.
# Seen, executorch 1.5.1 with torch 2.13.0: `import executorch.exir` imports torch._inductor's lowerings, scheduler and
# templates, since one of its passes takes one function from torch._inductor.fx_passes.post_grad, and so does the module
# that registers executorch's attention operators, to tell inductor of two of them:
#
#     modules of inductor: 0 with torch.export, 173 with executorch.exir
#
# So: a command that lowers pays a third of its start for a compiler that it never calls. Where the start matters, the two
# modules can be stood in for while executorch is imported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 executorch==1.5.1 torchao==0.18.0
cd "$folder"
loaded() { "$folder/venv/bin/python" -c "import sys, $1; print(*(m for m in sys.modules if m.startswith('torch._inductor')), sep='\n')" 2> log; }
loaded torch.export > alone
loaded executorch.exir > exir
echo "modules of inductor: $(grep -c . alone || true) with torch.export, $(grep -c . exir) with executorch.exir"
grep -qx torch._inductor.lowering alone && { echo "torch.export imports inductor's lowerings by itself" >&2; exit 1; }
grep -qx torch._inductor.lowering exir || { echo "executorch.exir does not import inductor's lowerings any more" >&2; exit 1; }
echo "executorch.exir imports inductor's lowerings, torch.export does not"
