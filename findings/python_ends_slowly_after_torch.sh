#!/usr/bin/env bash
# Expected: a process that has imported torch and executorch's exporter, and is done, ends at once: the system takes its
# memory back, whatever is in it.
# Seen, Python 3.11 with torch 2.13.0, torchao 0.18.0 and executorch 1.5.1: the interpreter takes a second more to end. On
# its way out it looks for garbage among the million objects of the imports, and finds next to none. Told that they are
# no garbage (`gc.freeze()` as the last thing), it does not look:
#
#     seconds of processor: 5.41, and 4.40 with gc.freeze() at the end
#
# So: a command line that imports torch keeps who waits for it a second longer than its work, each time. `gc.freeze()`,
# registered with atexit, is nearly as good as os._exit(), and what else is registered, or open, still ends as it should.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 executorch==1.5.1 torchao==0.18.0
cd "$folder"
cat > ends.py << 'PY'
import resource
import subprocess
import sys

IMPORTS = "import gc, torch, torchao.quantization, executorch.exir"


def seconds(code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime


seconds(IMPORTS)  # compiles them
plain, frozen = zip(*((seconds(IMPORTS), seconds(f"{IMPORTS}; gc.freeze()")) for _ in range(5)), strict=True)
print(f"{min(plain):.2f} {min(frozen):.2f}")
PY
read -r plain frozen < <("$folder/venv/bin/python" ends.py)
echo "seconds of processor: $plain, and $frozen with gc.freeze() at the end"
awk "BEGIN { exit !($plain > 1.15 * $frozen) }" || { echo "it ends as soon either way" >&2; exit 1; }
