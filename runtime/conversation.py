"""A chat that stays within what a program holds: the oldest turns go first, and that is said."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.answers import prompt_of
from runtime.errors import UsageError
from runtime.text import TextArtifact
from runtime.tokenizer import encode

Message = dict[str, str]


@dataclass
class Conversation:
    """system: what is said first, and always kept. messages: of user and assistant, in turn, all that there were."""

    artifact: TextArtifact
    max_new_tokens: int
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> tuple[list[int], int]:
        """(the prompt with as much of the chat as there is room for, how many messages were left out).

        Raises `UsageError` for a message that has no room alone, and keeps the chat as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, dropped = fitted(self.artifact, asked, self.max_new_tokens, self.system)
        self.messages = asked
        return ids, dropped

    def answered(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> bool:
        """Forget the last message and its answer; whether there was one."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[asked[-1] if asked else 0 :]
        return bool(asked)

    @property
    def listed(self) -> list[Message]:
        return [*_first(self.system), *self.messages]


def fitted(
    artifact: TextArtifact, messages: list[Message], max_new_tokens: int, system: str | None = None
) -> tuple[list[int], int]:
    """(prompt, how many of the oldest messages it lacks). What is left begins with a user's message.

    Raises `UsageError` where not even the last message has room, or for messages that the template does not take.
    """
    starts = [i for i, message in enumerate(messages) if message["role"] == "user" or i == 0]
    room = artifact.program.max_seq_len - max_new_tokens
    for start in starts:
        ids = encode(artifact.tokenizer, prompt_of(artifact, [*_first(system), *messages[start:]], chat=True))
        if len(ids) <= room:
            return ids, start
    raise UsageError(
        f"the message takes {len(ids)} tokens with its template, and an answer of {max_new_tokens} leaves room for "
        f"{max(0, room)} of {artifact.program.max_seq_len}: give max_new_tokens=, or a shorter message"
    )


def _first(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]
