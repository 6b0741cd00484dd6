"""`chat`: a conversation with an artifact, the masks shown as they are filled in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from pipeline.decoding import decoding_options
from pipeline.opening import opened
from pipeline.schema import ChatConfig
from pipeline.view import View
from report.files import check_output, write_text
from runtime.answers import EMPTY, answer, prompt_of, typed
from runtime.conversation import Conversation
from runtime.errors import UsageError
from runtime.text import TextArtifact

HELP = "/undo forgets the last turn, /clear all of them, /save FILE keeps the chat, /quit (or Ctrl-D) ends"
MOST_NEW = 256  # tokens of an answer, where nobody says


def chat(config: ChatConfig, err: Console) -> None:
    """Lines of stdin are messages; answers go to stdout, all else to stderr. Raises `PipelineError`."""
    if config.save is not None:
        check_output(Path(config.save))
    artifact = opened(config, err)
    prompt_of(artifact, "", chat=True)  # has it a template?
    n_new = min(MOST_NEW, artifact.program.max_seq_len // 2) if config.max_new_tokens is None else config.max_new_tokens
    talk = _Talk(config, err, artifact, Conversation(artifact, n_new, config.system))
    if err.is_terminal:
        err.print(HELP, style="dim", markup=False)
    while (line := talk.line()) is not None:
        talk.hear(line)


class _Talk:
    def __init__(self, config: ChatConfig, err: Console, artifact: TextArtifact, conversation: Conversation) -> None:
        self.config, self.err, self.artifact, self.conversation = config, err, artifact, conversation
        self.options = decoding_options(config, config.cache)
        self.stop = typed(config.stop)
        self.before = ""  # what the file of the chat held
        if config.save is not None and (file := Path(config.save)).is_file():
            self.before = file.read_text(encoding="utf-8")

    def line(self) -> str | None:
        """The next message; None at the end."""
        if self.err.is_terminal:
            self.err.print("> ", end="", style="bold")
        if sys.stdin is None or not (line := sys.stdin.readline()):
            return None
        return None if line.strip() in ("/quit", "/exit") else line.strip()

    def hear(self, line: str) -> None:
        """A message or a command; what is wrong with it is said, and the chat goes on."""
        try:
            if line.startswith("/"):
                self._obey(*line[1:].split(maxsplit=1))
            elif line:
                self._answer(line)
        except UsageError as error:
            self.err.print(f"error: {error}", markup=False)

    def _obey(self, command: str = "", argument: str = "") -> None:
        conversation = self.conversation
        if command == "undo":
            self._note("forgotten" if conversation.undo() else "there is nothing to undo")
        elif command == "clear":
            conversation.messages.clear()
            self._note("forgotten, all of it")
        elif command == "save" and argument:
            write_text(Path(argument).expanduser(), self._saved())
            self._note(f"kept in {argument}")
        else:
            self._note(HELP)

    def _answer(self, text: str) -> None:
        conversation = self.conversation
        ids, dropped = conversation.ask(text)
        if dropped:
            held = self.artifact.program.max_seq_len
            self._note(f"the first {dropped} messages have no room in the {held} tokens that the program holds")
        view = View(self.artifact, self.err)
        view.start = len(ids)
        try:
            with view.live():
                given = answer(self.artifact, ids, conversation.max_new_tokens, self.options, self.stop, view.update)
        except (KeyboardInterrupt, UsageError):
            conversation.undo()
            raise
        conversation.answered(given.text.strip())
        sys.stdout.write(given.text.strip() + "\n")
        sys.stdout.flush()
        if not given.text.strip():
            self._note(EMPTY)
        if self.config.save is not None:
            write_text(Path(self.config.save), self.before + self._saved())

    def _saved(self) -> str:
        """As `prompts=` and `calibration=` read it."""
        return json.dumps({"messages": self.conversation.listed}, ensure_ascii=False) + "\n"

    def _note(self, text: str) -> None:
        self.err.print(text, style="dim", markup=False)
