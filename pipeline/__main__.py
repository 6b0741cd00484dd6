"""`python -m pipeline`: the command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]) != Path(__file__).parent.parent:
    # `-m` looks in the user's folder first: one that has a room's name there is not ours.
    del sys.path[0]

from pipeline import interrupt
from pipeline.streams import standard_streams
from runtime.errors import BadArtifactError, OutputError
from runtime.memory import collect_seldom

FOREIGN = ("generate", "chat", "serve", "evaluate")  # commands that run an artifact's program in their own process

HELP = """\
DreamEdge: a Dream checkpoint to a validated ExecuTorch program.

usage: python -m pipeline COMMAND [key=value ...]

commands:
  run       build an artifact        [checkpoint=DIR] [recipe=NAME] [output=DIR] [overwrite=true] [targets=[host,arm64]]
  validate  check an artifact again  artifact=DIR [checkpoint=DIR] [baseline=DIR] [target=arm64] [summary=FILE]
  inspect   show what is in it       artifact=DIR [--json]
  sign      sign it                  artifact=DIR key=FILE
  verify    whether it was changed   artifact=DIR | registry=DIR|URL [key=FILE]
  generate  write text               artifact=DIR [prompt=TEXT | prompts=FILE | prefix=TEXT suffix=TEXT] [cache=dual]
  chat      talk with it             artifact=DIR [system=TEXT] [save=FILE] [cache=dual] [threshold=0.9]
  serve     behind the OpenAI API    artifact=DIR [port=8000] [cache=dual] [threshold=0.9]
  evaluate  let it solve a task      artifact=DIR [task=NAME] [n=N] [caches=[none,prefix,dual]]
  bench     measure its speed        artifact=DIR [output=FILE]
  compare   any number of artifacts  DIR DIR ... [--json] [html=FILE] [summary=FILE]
  release   choose what to ship      DIR DIR ... [budget.kl=NATS] [budget.bytes=N] [baseline=DIR] [key=FILE]
  publish   into a registry          DIR ... registry=DIR|URL
  fetch     out of a registry        [ID|NAME] registry=DIR|URL [output=DIR] [key=FILE]
  explain   show where error arises  artifact=DIR checkpoint=DIR [output=FILE]
  tune      choose formats           budget.kl=NATS | budget.bytes=N [checkpoint=DIR] [output=FILE] [plot=FILE]
  clean     remove quantized weights [cache=DIR]
  recipes   list the recipes

`COMMAND --help` lists the keys of a command. Configuration is Hydra's: `run --cfg job` shows all of it,
`run --multirun recipe=int4_xnnpack,int8_xnnpack` builds several. The same program is installed as `dreamedge`;
eval "$(dreamedge --shell-completion install=bash)" completes its commands, keys and values.

exit codes: 0 done, 1 internal error, 2 wrong command, key or value, 3 unusable checkpoint, 4 recipe cannot be
applied, 5 a figure is out of bounds, 6 damaged artifact or program, 7 output cannot be written, 8 too little memory
or disk, 9 a job of a sweep was killed, 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    is_closed = sys.stdout is None
    with standard_streams():
        try:
            if is_closed:
                raise OutputError("stdout cannot be written: it is closed")
            code = _main(argv)
            sys.stdout.flush()
            return code
        except OutputError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code


def _main(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0 if arguments else 2
    if argv is None and arguments[0] in FOREIGN and (code := _watched()) is not None:
        return code
    if argv is None:
        collect_seldom()
    interrupt.listen()
    from pipeline.cli import dispatch

    return dispatch(arguments[0], arguments[1:])


def _watched() -> int | None:
    """Go on in a child, where this returns None. Here: its exit code, and a line if the program inside crashed it."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return None
    while True:
        info = signal.sigwaitinfo(signals)
        if info.si_signo != signal.SIGCHLD:
            if info.si_code <= 0:  # sent to us alone; Ctrl-C goes to all processes of a terminal
                os.kill(child, info.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status)
        if ended and code >= 0:
            return code
        if ended:
            sys.stderr.write(f"error: the runtime crashed ({signal.Signals(-code).name}) while running the program\n")
            return BadArtifactError.exit_code


if __name__ == "__main__":
    sys.exit(main())
