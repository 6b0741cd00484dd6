"""A conversation: its history, what has no room, what is undone and kept."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.answers import answer
from runtime.conversation import Conversation, fitted
from runtime.errors import UsageError
from runtime.text import TextArtifact, open_text_artifact
from runtime.tokenizer import decode

Talk = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def talk(pipeline: Callable[..., tuple[int, str, str]], chatty_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """talk(lines, options): (exit code, answers, stderr)."""

    def said(lines: list[str], *options: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code, out, err = pipeline("chat", f"artifact={chatty_artifact}", "max_new_tokens=4", *options)
        return code, out.splitlines(), err

    return said


@pytest.fixture(scope="module")
def artifact(chatty_artifact: Path) -> TextArtifact:
    return open_text_artifact(chatty_artifact)


def told(artifact: TextArtifact, messages: list[tuple[str, str]]) -> str:
    """The template of `chatty`, written plainly."""
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return f"{turns}<|im_start|>assistant\n"


def test_each_answer_knows_what_was_said(talk: Talk, artifact: TextArtifact, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    code, _, err = talk(["the cat", "", "the hat"], f"save={file}", "system=be a cat, ok?")
    assert (code, err) == (0, "")
    (line,) = file.read_text().splitlines()
    messages = [(message["role"], message["content"]) for message in json.loads(line)["messages"]]
    assert [role for role, _ in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [content for role, content in messages if role != "assistant"] == ["be a cat, ok?", "the cat", "the hat"]
    for i in (2, 4):
        ids = artifact.tokenizer.encode(told(artifact, messages[:i]), add_special_tokens=False).ids
        written = answer(artifact, ids, 4, {"stop_at_eos": True})
        assert written.text.strip() == messages[i][1]


def test_a_turn_is_undone_and_a_chat_forgotten_and_kept(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    lines = ["the cat", "the hat", "/undo", "the rat", f"/save {file}", "/clear", "/undo", "/what", "/quit", "never"]
    code, _, err = talk(lines)
    assert code == 0
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["the cat", "the rat"]
    said = err.splitlines()
    assert said[:2] == ["forgotten", f"kept in {file}"]
    assert said[2:4] == ["forgotten, all of it", "there is nothing to undo"]
    assert said[4].startswith("/undo forgets")
    assert len(said) == 5


def test_a_saved_chat_is_added_to_a_file(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    for line in ("the cat", "the hat"):
        assert talk([line], f"save={file}")[0] == 0
    asked = [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()]
    assert asked == ["the cat", "the hat"]


def test_what_has_no_room_is_said(talk: Talk) -> None:
    long = "the cat and the hat " * 12
    code, _, err = talk([long, "the rat", long, "the mat", "a" * 500, "the cat"], "system=cat")
    assert code == 0
    said = err.splitlines()
    assert said[0] == "the first 2 messages have no room in the 128 tokens that the program holds"
    assert any(line.startswith("error: the message takes ") for line in said)
    assert "Traceback" not in err


def test_the_oldest_turns_go_and_a_user_begins(artifact: TextArtifact) -> None:
    for n_turns in range(8):
        messages = [("user", "the cat"), ("assistant", "sat")] * n_turns + [("user", "the hat")]
        listed = [{"role": role, "content": content} for role, content in messages]
        ids, dropped = fitted(artifact, listed, 60, "be brief")
        assert dropped % 2 == 0
        kept = [("system", "be brief"), *messages[dropped:]]
        assert decode(artifact.tokenizer, ids, skip_special_tokens=False) == told(artifact, kept)
        assert len(ids) <= 68
        if dropped:
            more = told(artifact, [("system", "be brief"), *messages[dropped - 2 :]])
            assert len(artifact.tokenizer.encode(more, add_special_tokens=False).ids) > 68
    assert dropped > 0


def test_a_message_without_room_changes_nothing(artifact: TextArtifact) -> None:
    conversation = Conversation(artifact, 8)
    conversation.ask("the cat")
    conversation.answered("sat")
    with pytest.raises(UsageError, match="give max_new_tokens="):
        conversation.ask("é" * 200)
    assert [message["content"] for message in conversation.messages] == ["the cat", "sat"]


def test_what_cannot_be_talked_with(
    pipeline: Callable[..., tuple[int, str, str]], chatty_artifact: Path, talk: Talk, tmp_path: Path
) -> None:
    shutil.copytree(chatty_artifact, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer_config.json").write_text("{}")
    code, out, err = pipeline("chat", f"artifact={tmp_path / 'mute'}")
    assert (code, out) == (2, "")
    assert "has no chat template" in err
    code, _, err = talk(["x"], f"save={tmp_path / 'no' / 'such'}")
    assert code == 7
    code, _, err = talk(["x", "the cat"], "temperature=-1")
    assert code == 0
    assert err.count("error: temperature -1") == 2
