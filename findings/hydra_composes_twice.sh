#!/usr/bin/env bash
# Expected: a program under @hydra.main composes its configuration once, and then runs.
# Seen, hydra-core 1.3.8 with omegaconf 2.3.1: it is composed twice. The first is thrown away: of it only `hydra.mode` is
# read, to learn whether it is a single run or a sweep, which the flags had said. An error in it is swallowed, and comes
# up in the second. Reading files, defaults lists and overrides is all that a short command does:
#
#     configurations composed: 2 for one run
#
# So: of a short command with a dozen choices and structured schemas, a third of the time is for a configuration that
# nobody sees. Where the mode is never configured, the question need not be asked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8 omegaconf==2.3.1
cd "$folder"
mkdir conf
echo "size: 3" > conf/app.yaml
cat > app.py << 'PY'
import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl

load, composed = ConfigLoaderImpl.load_configuration, []


def counted(*args, **kwargs):
    composed.append(kwargs.get("config_name"))
    return load(*args, **kwargs)


ConfigLoaderImpl.load_configuration = counted


@hydra.main(config_path="conf", config_name="app", version_base="1.3")
def main(config):
    assert config.size == 4
    print(composed.count("app"))


main()
PY
n=$("$folder/venv/bin/python" app.py size=4 hydra.run.dir=. hydra.output_subdir=null)
echo "configurations composed: $n for one run"
[ "$n" = 2 ] || { echo "it was twice with hydra-core 1.3.8" >&2; exit 1; }
