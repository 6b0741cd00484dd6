"""Functions with a gap. Each suffix ends with a test, which the whole has to pass."""

import contextlib
import io


def check(prompt: str, answer: str, suffix: str) -> bool:
    """Runs what it is given: evaluate does so in a process of its own, with limits."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(prompt + answer + suffix, "answer", "exec"), {})
    except (Exception, SystemExit):  # noqa: BLE001 (whatever the answer does)
        return False
    return True
