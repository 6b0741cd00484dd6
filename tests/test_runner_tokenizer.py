"""The native runner's tokenizer against the `tokenizers` library; and the runner's readers, with damaged files."""

# ruff: noqa: RUF001 - hard characters are what this is about
from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from runtime.errors import UsageError
from runtime.tokenizer import decode, encode, load_tokenizer
from tests.checkpoints import BUNDLED, Build
from tests.fuzz import NOT_TO_RESEAL, REFUSED, TAKEN, damage, tokenizer_json
from tests.resealing import reseal
from tests.test_tokenizer import BROKEN_JSON, HARD, KINDS, VOCAB, built, saved, serialized, without, write

# Where the two libraries know Unicode in another version, they may differ: characters that are in both.
ALPHABETS = (
    [*map(chr, range(0x20, 0x250))],
    [*"\n\r\t ſ’'s\u0301\u0308\u200b\u200d\u2028\u180e\u3000日本語안녕ไทยעבר١٢½Ⅷⓐ👍🏽🇩🇪"],
)


class Native:
    """One process of `dreamedge-check tokenizer`."""

    def __init__(self, check: Path, file: Path) -> None:
        self.process = subprocess.Popen(
            [check, "tokenizer", file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def __call__(self, asked: str | list[int]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


@pytest.fixture
def native(check: Path) -> Iterator[Callable[[Path], Native]]:
    opened: list[Native] = []

    def open_one(file: Path) -> Native:
        opened.append(Native(check, file))
        return opened[-1]

    yield open_one
    for one in opened:
        one.end()


def refusal(ours: Tokenizer, text: str) -> str | None:
    try:
        encode(ours, text)
    except UsageError as error:
        return str(error)
    return None


def same(native: Native, ours: Tokenizer, text: str) -> None:
    if (error := refusal(ours, text)) is not None:
        assert native(text) == {"error": error, "code": 2}
        return
    ids = encode(ours, text)
    assert native(text) == ids, ascii(text)[:200]
    assert native(ids) == [decode(ours, ids, False), decode(ours, ids, True)]


def drawn(chance: random.Random) -> str:
    parts = [chance.choice((*KINDS["flags"]["tokenizer_config"]["added_tokens_decoder"].values(), None)) for _ in "123"]
    words = ["".join(chance.choices(chance.choice(ALPHABETS), k=chance.randrange(12))) for _ in parts]
    return "".join(w + (p["content"] if p else "") for w, p in zip(words, parts, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_as_the_library(native: Callable[[Path], Native], tmp_path: Path, kind: str) -> None:
    ours = load_tokenizer(write(tmp_path, **KINDS[kind]))
    assert ours is not None
    file = tmp_path / "tokenizer.json"
    ours.save(str(file))
    mine, chance = native(file), random.Random(kind)
    for text in (*HARD, *(drawn(chance) for _ in range(150))):
        same(mine, ours, text)
    for _ in range(100):  # also half characters, and ids beyond the last
        ids = [chance.randrange(len(VOCAB) + 20) for _ in range(chance.randrange(20))]
        assert mine(ids) == [decode(ours, ids, False), decode(ours, ids, True)]


@pytest.mark.parametrize("kind", ["bundled", "GPT-2's pattern", "without bytes", "one pattern more"])
def test_other_tokenizers(native: Callable[[Path], Native], tmp_path: Path, kind: str) -> None:
    if kind == "bundled":
        shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    elif kind == "one pattern more":
        tokenizer_json(BUNDLED, tmp_path)
    else:
        tokenizer = built() if kind == "GPT-2's pattern" else built(without("q", " ", "\n", "é"))
        tokenizer.normalizer = normalizers.NFC()
        saved(tokenizer, tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    mine, chance = native(tmp_path / "tokenizer.json"), random.Random(kind)
    for text in (*HARD, *(drawn(chance) for _ in range(100))):
        same(mine, ours, text)


UNKNOWN: dict[str, tuple[str, str]] = {
    "normalizer": (serialized(normalizer={"type": "NFKC"}), "the normalizer 'NFKC', which is not known here"),
    "pre_tokenizer": (serialized(pre_tokenizer={"type": "Whitespace"}), "the pre_tokenizer 'Whitespace'"),
    "no pre_tokenizer": (serialized(pre_tokenizer=None), "are not ByteLevel"),
    "decoder": (serialized(decoder={"type": "Fuse"}), "are not ByteLevel"),
    "model": (serialized(type="WordLevel"), "its model is not BPE"),
    "byte_fallback": (serialized(byte_fallback=True), "model.byte_fallback, which is not known here"),
    "dropout": (serialized(dropout=0.5), "model.dropout"),
    "suffix": (serialized(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    "key": (json.dumps(json.loads(serialized()) | {"more": 1}), "the key 'more'"),
    "key of the model": (serialized(model=json.loads(serialized())["model"] | {"more": 1}), "the key 'more'"),
} | {
    f"pattern {pattern}": (
        serialized(pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}), said,
    )
    for pattern, said in (
        (r"\w+", r"the escape \w"), (r"^a", "the anchor ^"), (r"(?m:a)", "the group (?m:"), (r"[a&&b]", "a class in"),
        (r"\h", r"the escape \h"), (r"(*FAIL)", "a verb"), (r"(", "a broken pattern"), (r"[[:alpha:]]", "a class in"),
    )
}  # fmt: skip


def files(check: Path, kind: str, *paths: Path) -> list[str]:
    ended = subprocess.run(
        [check, "files", kind], input="".join(f"{p}\n" for p in paths), capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr[-3000:]
    return ended.stdout.splitlines()


def test_what_is_not_known_is_refused(check: Path, tmp_path: Path) -> None:
    cases = UNKNOWN | {n: (c, "") for n, (c, _) in BROKEN_JSON.items() if n != "prefix"}
    paths = [tmp_path / str(i) for i in range(len(cases))]
    for path, (content, _) in zip(paths, cases.values(), strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for (name, (_, said)), word in zip(cases.items(), files(check, "tokenizer", *paths), strict=True):
        assert word.startswith("refused: "), name
        assert "not a tokenizer: " in word
        assert said in word


def test_a_text_that_takes_a_pattern_too_long(native: Callable[[Path], Native], tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": r"(?:a+)+\d"}, "behavior": "Isolated"}
    before = {"type": "Sequence", "pretokenizers": [pattern, json.loads(serialized())["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(serialized(pre_tokenizer=before))
    said = native(tmp_path / "tokenizer.json")("a" * 60)
    assert "too many steps" in said["error"]
    assert said["code"] == 2


# ---- Damaged files ----


@pytest.mark.parametrize("kind", ["tokenizer", "reference", "artifact"])
def test_damaged_files_are_refused_or_read(build: Build, check: Path, tmp_path: Path, kind: str) -> None:
    """What breaks the readers ends them, under sanitizers, with something on stderr."""
    names = {"tokenizer": "tokenizer.json", "reference": "reference.safetensors", "artifact": "manifest.json"}
    source = build("gqa2", "fp32_xnnpack")
    if kind == "tokenizer":
        tokenizer_json(BUNDLED, tmp_path / "whole")
        source = tmp_path / "whole"
    whole = (source / names[kind]).read_bytes()
    paths = [source / names[kind]]
    for seed in range({"tokenizer": 80, "reference": 200, "artifact": 60}[kind]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / names[kind]).write_bytes(damage(whole, names[kind], seed))
        if kind == "artifact":
            for file in source.iterdir():
                if file.name not in ("manifest.json", "report.html"):
                    shutil.copy(file, folder)
            if seed % 2:
                with contextlib.suppress(*NOT_TO_RESEAL):
                    reseal(folder)
        paths.append(folder / names[kind])
    words = [line.partition(":")[0] for line in files(check, kind, *paths)]
    assert len(words) == len(paths)
    assert words[0] == TAKEN
    assert set(words) <= {TAKEN, REFUSED}
    assert REFUSED in words
    if kind == "artifact":
        assert set(words[1::2]) == {REFUSED}, "those that were not sealed again differ from what they say"
