"""The checkpoint's tokenizer and chat template against transformers', and what is refused."""

# ruff: noqa: RUF001 - hard characters are what this is about
from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from runtime import tokenizer as module
from runtime.chat import chat_template, end_tokens, render_chat
from runtime.errors import InputError, UsageError
from runtime.tokenizer import decode, encode, load_tokenizer, special_tokens
from runtime.tokenizer_files import MAX_BYTES
from tests.checkpoints import ROOT

TRAINED_ON = [
    "The quick brown fox doesn't jump over the lazy dog, but they'll say it's 1234 times we've seen 56.78 of them.",
    "Der schnelle braune Fuchs springt über den faulen Hund; größer, schöner, höher als Ärger und Öl.",
    "El veloz murciélago hindú comía feliz cardillo y kiwi. ¿Qué pasó? ¡Nada! La cigüeña tocaba el saxofón.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Широкая электрификация южных губерний.",
    "敏捷的棕色狐狸跳过了懒狗。机器学习模型可以生成文本。今天天气很好，我们去公园散步吧。",
    "いろはにほへとちりぬるを。カタカナとひらがなと漢字を混ぜて書きます。東京は日本の首都です。",
    "다람쥐 헌 쳇바퀴에 타고파. 안녕하세요, 오늘은 날씨가 좋습니다.",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. دخل الولد إلى المدرسة.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले विष्णुवतार।",
    "def main(argv: list[str]) -> int:\n\tfor i in range(10):\n\t\tprint(f'{i:>3}')\r\n    return 0  # done\n\n\n",
    '<html>\n  <body class="x">&nbsp;</body>\n</html>\n{"key": [1, 2.5, null, true]}',
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
ADDED = [*SPECIAL[:3], "<tool_call>", "</tool_call>", *SPECIAL[3:]]
MAP = {
    "bos_token": "<|beginoftext|>",
    "eos_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False},
    "pad_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}
CHATML = """\
{%- if messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {% endif %}
    {% if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}
    {% elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {% generation %}
        {{- '<|im_start|>assistant\\n' + content + eos_token }}
        {% endgeneration %}

    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HARD = [
    "",
    " ",
    "Hello world",
    "I'm, you're, WE'VE, they'll, he'd, it's, can't, 'S 'T ſ'ſ ’s",
    "  leading and trailing  ",
    "a \t b\t\tc \n d\n\n\ne\r\nf\r\n\r\n g\rh \n  \n\t\n",
    "nbsp\u00a0\u00a0and\u2003em\u3000wide\u2028line\u2029paragraph\x85next\x0b\x0c",
    "0 12 345 6789 1234567890 ½ ² Ⅷ ١٢٣ १२३ 1,234.56",
    "e\u0301 \u00e9 A\u030a \u212b \u1100\u1161\u11a8 각 \ufb01 q\u0307\u0323 \u0344 \u0958 \u2126",
    "\u0301starts with a mark, ends with one e\u0301",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪🇯🇵 👍🏽 ☺️ 1️⃣",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeffbom\u2060word\u00adsoft",
    "\x00\x01\x1f\x7f\x80\x9f\ufffd\ufffe\U0010ffff\ue000",
    "x" * 20_000,
    "多" * 5_000,
    "no-space." * 2_000,
    " " * 5_000 + "a" + "\n" * 5_000,
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|mask|><|mask|><|mask|>",
    "a<|mask|>b <|mask|> c\n<|mask|>\n<|endoftext|>",
    '<|beginoftext|><tool_call>\n{"a": 1}\n</tool_call><|endoftext|>',
    "<|mask|>\u0338 <tool_call>\u0301 e<|mask|>\u0301 <|\u200bmask|> <|MASK|> <|mask|",
    "<<|mask|>> <|im_start|<|im_end|>|> <|endoftext|><|endoftext|>",
    "Ġ Ċ ĉ Â é Ã© <0x0A> ▁ ##x",
    "العربية עברית ไทย မြန်မာ ქართული አማርኛ 𐍈 𒀀 𝕏",
]
few = settings(max_examples=400, deadline=None, derandomize=True)
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.text(st.characters(categories=("Zs", "Zl", "Zp", "Cc", "Cf", "Mn", "Mc", "Nd"))),
        st.text("aeioué\u0301\u0308 \t\r\n'stredvml019.,<|>_"),
        st.sampled_from([*ADDED, *HARD[:13]]),
    ),
    max_size=8,
).map("".join)


def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE, with Qwen2's own pre-tokenizer as transformers has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TRAINED_ON * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


VOCAB, MERGES = trained()
IDS = {token: len(VOCAB) + index for index, token in enumerate(ADDED)}


def flags(content: str, **own: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **plain, "special": content in SPECIAL, **own}


DECODER = {str(index): flags(token) for token, index in IDS.items()}
# As in Dream-7B: the tokens with their flags, and the files of older versions beside them.
FULL = {"added_tokens_decoder": DECODER, **MAP, "eos_token": "<|endoftext|>", "add_prefix_space": False}


def write(folder: Path, **files: Any) -> Path:
    """files: added_tokens, special_tokens_map, tokenizer_config, and vocab and merges in place of the trained ones."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = "".join(f"{left} {right}\n" for left, right in files.pop("merges", MERGES))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    for name, content in ({"vocab": VOCAB} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


KINDS: dict[str, dict[str, Any]] = {
    "dream": {"added_tokens": IDS, "special_tokens_map": MAP, "tokenizer_config": FULL},
    "older": {"added_tokens": IDS, "special_tokens_map": MAP, "tokenizer_config": {"model_max_length": 128}},
    "config only": {"tokenizer_config": FULL},
    "bare": {},
    # transformers goes by the config alone if that has the tokens.
    "contradicting": {"tokenizer_config": FULL, "added_tokens": {"x": 1}, "special_tokens_map": {"eos_token": "<x>"}},
    "unnumbered": {
        "added_tokens": {token: IDS[token] for token in ADDED[:4]},
        "special_tokens_map": {**MAP, "image_token": "<image>", "sep_token": "he", "unk_token": None},
        "tokenizer_config": {"additional_special_tokens": ["<one>", {"content": "<two>", "__type": "AddedToken"}]},
    },
    "flags": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                **DECODER,
                str(IDS["<tool_call>"]): flags("<tool_call>", lstrip=True, rstrip=True),
                str(IDS["</tool_call>"]): flags("</tool_call>", normalized=True),
                str(IDS["<|mask|>"]): flags("<|mask|>", lstrip=True),
                str(len(VOCAB) + 7): flags("word", single_word=True),
                str(len(VOCAB) + 8): flags("<é>", normalized=True, special=True),
                str(VOCAB["he"]): flags("he"),
            },
            "mask_token": "<|mask|>",
        }
    },
    "prefix space": {"tokenizer_config": {**FULL, "add_prefix_space": True}},
}


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Any]]:
    """Ours, read and read again from what `save` wrote, each with transformers'."""
    folder = write(tmp_path_factory.mktemp("tokenizer"), **KINDS[request.param])
    ours, expected = load_tokenizer(folder), Qwen2Tokenizer.from_pretrained(str(folder))
    assert ours is not None
    saved = folder / "saved"
    saved.mkdir()
    ours.save(str(saved / "tokenizer.json"))
    again = load_tokenizer(saved)
    assert again is not None
    assert again.to_str() == ours.to_str()
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"))
    return [(ours, expected), (again, expected), (ours, loaded)]


def same(ours: Tokenizer, expected: Any, text: str) -> None:
    ids = encode(ours, text)
    assert ids == expected.encode(text, add_special_tokens=False)
    for skip in (False, True):
        assert decode(ours, ids, skip) == expected.decode(ids, skip_special_tokens=skip)
    assert decode(ours, ids) == decode(ours, ids, skip_special_tokens=True)


# ---- As transformers ----


@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text)[:30])
def test_hard_strings(both: list[tuple[Tokenizer, Any]], text: str) -> None:
    for ours, expected in both:
        same(ours, expected, text)


@few
@given(text=texts)
def test_any_text(both: list[tuple[Tokenizer, Any]], text: str) -> None:
    same(*both[0], text)


@few
@given(data=st.data())
def test_any_ids(both: list[tuple[Tokenizer, Any]], data: st.DataObject) -> None:
    """Also half characters, and ids beyond the last: a model's vocabulary is often padded."""
    ours, expected = both[0]
    ids = data.draw(st.lists(st.integers(0, len(VOCAB) + 20), max_size=20))
    for skip in (False, True):
        assert decode(ours, ids, skip) == expected.decode(ids, skip_special_tokens=skip)


def test_the_same_tokens(both: list[tuple[Tokenizer, Any]]) -> None:
    for ours, expected in both:
        assert ours.get_vocab() == expected.get_vocab()
        state = {index: token.__getstate__() for index, token in ours.get_added_tokens_decoder().items()}
        assert state == {index: token.__getstate__() for index, token in expected.added_tokens_decoder.items()}


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = load_tokenizer(write(tmp_path_factory.mktemp("dream"), **KINDS["dream"]))
    assert tokenizer is not None
    return tokenizer


@few
@given(text=texts)
def test_text_comes_back(dream: Tokenizer, text: str) -> None:
    """Every byte is in the vocabulary: what is decoded is the text, but for its normal form."""
    ids = encode(dream, text)
    assert unicodedata.normalize("NFC", decode(dream, ids, False)) == unicodedata.normalize("NFC", text)


def test_ids_that_were_left_out_stay_so(tmp_path: Path) -> None:
    """transformers would number them anew, without a word, and the model would see another token."""
    mask = str(len(VOCAB) + 300)
    config = {"added_tokens_decoder": {str(len(VOCAB)): flags("<|endoftext|>"), mask: flags("<|mask|>")}}
    ours = load_tokenizer(write(tmp_path, tokenizer_config=config))
    assert ours is not None
    (tmp_path / "saved").mkdir()
    again = load_tokenizer(saved(ours, tmp_path / "saved"))
    assert again is not None
    for tokenizer in (ours, again):
        assert encode(tokenizer, "<|endoftext|><|mask|>") == [len(VOCAB), int(mask)]
        assert decode(tokenizer, [int(mask)], False) == "<|mask|>"
        assert decode(tokenizer, [int(mask)]) == ""


# ---- tokenizer.json ----


def built(model: models.Model | None = None, added: list[str] = ADDED) -> Tokenizer:
    tokenizer = Tokenizer(model or models.BPE(vocab=VOCAB, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL) for token in added])
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text)[:30])
def test_a_tokenizer_json(tmp_path: Path, text: str) -> None:
    """It is read as it is (this one has no NFC and another pre-tokenizer), and before vocab.json."""
    write(tmp_path, vocab={"x": 0}, merges=[])
    expected = PreTrainedTokenizerFast(tokenizer_file=str(saved(built(), tmp_path) / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    same(ours, expected, text)


def test_the_bundled_tokenizer() -> None:
    folder = ROOT / "assets" / "dream_sudoku"
    ours = load_tokenizer(folder)
    assert ours is not None
    same(ours, PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), "1230\n<|mask|> é👍")


def test_no_text_is_cut(tmp_path: Path) -> None:
    tokenizer = built()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100)
    ours = load_tokenizer(saved(tokenizer, tmp_path))
    assert ours is not None
    assert encode(ours, "0123456789") == encode(built(), "0123456789")


def test_no_tokens_are_added(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = built()
    end = ("<|endoftext|>", IDS["<|endoftext|>"])
    tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[end])
    ours = load_tokenizer(saved(tokenizer, tmp_path))
    assert ours is not None
    assert encode(ours, "a") == [VOCAB["a"]]


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert load_tokenizer(tmp_path) is None


# ---- Files that are refused ----


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


def config(entries: dict[str, Any]) -> str:
    return json.dumps({"added_tokens_decoder": entries})


FREE = str(len(VOCAB))
BROKEN: dict[str, tuple[str, str | bytes | None, str]] = {
    "no JSON": ("vocab.json", "{", "vocab.json: not JSON"),
    "not UTF-8": ("vocab.json", b'{"\xff": 0}', "vocab.json: not UTF-8"),
    "deep": ("vocab.json", nested(200_000), "vocab.json: not JSON: maximum recursion"),
    "no object": ("vocab.json", "[1]", "vocab.json: not a JSON object"),
    "text as id": ("vocab.json", '{"a": "0"}', "vocab.json: token 'a': '0' is no id"),
    "float as id": ("vocab.json", '{"a": 0.0}', "token 'a': 0.0 is no id"),
    "truth as id": ("vocab.json", '{"a": true}', "token 'a': True is no id"),
    "negative id": ("vocab.json", '{"a": -1}', "token 'a': -1 is no id"),
    "huge id": ("vocab.json", '{"a": 4294967295}', "token 'a': 4294967295 is no id"),
    "endless id": ("vocab.json", '{"a": 1%s}' % ("0" * 5000), "vocab.json: not JSON: Exceeds the limit"),
    "same id": ("vocab.json", '{"a": 0, "b": 1, "c": 0}', "tokens 'a' and 'c' have the same id 0"),
    "no vocabulary": ("vocab.json", None, "vocab.json: missing"),
    "surrogate": (
        "vocab.json",
        json.dumps({**VOCAB, "\udc80": len(VOCAB)}),
        "vocab.json: a token has '\\udc80', which is",
    ),
    "no merges": ("merges.txt", None, "merges.txt: missing"),
    "merges not UTF-8": ("merges.txt", b"a \xe9\n", "merges.txt: not UTF-8"),
    "one": ("merges.txt", "#version: 0.2\nh e\nhe\n", "merges.txt: line 3: 'he' is no pair of tokens"),
    "three": ("merges.txt", "h e l\n", "line 1: 'h e l' is no pair"),
    "blank": ("merges.txt", "h e\n\ne l\n", "line 2: '' is no pair"),
    "half": ("merges.txt", "h \n", "line 1: 'h ' is no pair"),
    "no result": ("merges.txt", "h e\nz q\n", "line 2: 'z q': 'zq' is not in the vocabulary"),
    "no part": ("merges.txt", "日 本\n", "line 1: '日 本': '日' is not in the vocabulary"),
    "added no JSON": ("added_tokens.json", "<|mask|>", "added_tokens.json: not JSON"),
    "added no id": ("added_tokens.json", '{"<|mask|>": null}', "added_tokens.json: token '<|mask|>': None is no id"),
    "added taken": ("added_tokens.json", '{"<|mask|>": 5}', "'<|mask|>' have the same id 5"),
    "added twice": ("added_tokens.json", f'{{"<a>": {FREE}, "<b>": {FREE}}}', "'<a>' and '<b>' have the same id"),
    "added moved": ("added_tokens.json", f'{{"he": {FREE}}}', "added token 'he': id"),
    "map no JSON": ("special_tokens_map.json", "", "special_tokens_map.json: not JSON"),
    "map no token": ("special_tokens_map.json", '{"mask_token": 5}', "mask_token: 5 is no token"),
    "map no content": (
        "special_tokens_map.json",
        '{"mask_token": {"lstrip": true}}',
        "mask_token: {'lstrip': True} is",
    ),
    "map no list": ("special_tokens_map.json", '{"extra_special_tokens": 5}', "extra_special_tokens: 5 is no list"),
    "config deep": ("tokenizer_config.json", nested(200_000), "tokenizer_config.json: not JSON"),
    "decoder none": ("tokenizer_config.json", '{"added_tokens_decoder": null}', "added_tokens_decoder: None is no obj"),
    "decoder no id": ("tokenizer_config.json", config({"-1": flags("<a>")}), "added_tokens_decoder: '-1'"),
    "decoder endless id": ("tokenizer_config.json", config({"9" * 9999: flags("<a>")}), "token '<a>': 999"),
    "decoder taken": ("tokenizer_config.json", config({"7": flags("<a>")}), "'<a>' have the same id 7"),
    "decoder no token": ("tokenizer_config.json", config({FREE: 1}), "1 is no token"),
    "decoder empty": ("tokenizer_config.json", config({FREE: flags("")}), "no id, or no new token"),
    "decoder twice": ("tokenizer_config.json", config({FREE: flags("<a>"), "9999": flags("<a>")}), "no new token"),
    "decoder no flag": ("tokenizer_config.json", config({FREE: flags("<a>") | {"lstrip": 1}}), "not a tokenizer"),
}


def refused(folder: Path, *words: str, call: Callable[[Path], object] = load_tokenizer) -> None:
    with pytest.raises(InputError) as caught:
        call(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 250
    for word in words:
        assert word in message


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path: Path, case: str) -> None:
    name, content, words = BROKEN[case]
    write(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path, words)


def serialized(**changes: Any) -> str:
    """tokenizer.json with changes to its `model`, or to what is beside it."""
    content = json.loads(built().to_str())
    for key, value in changes.items():
        (content if key in content else content["model"])[key] = value
    return json.dumps(content)


def entry(content: str, index: object) -> dict[str, object]:
    return {**flags(content), "id": index}


BROKEN_JSON: dict[str, tuple[str | bytes, str]] = {
    "no JSON": ("{", "not JSON"),
    "not UTF-8": (b'"\xff"', "not UTF-8"),
    "deep": (nested(200_000), "not JSON"),
    "deep for Rust": (serialized(normalizer=json.loads(nested(500))), "not a tokenizer"),
    "no model": ("{}", "not a tokenizer: "),
    "no such model": (serialized(model={"type": "none"}), "not a tokenizer"),
    "no pattern": (serialized(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}), "parenthesis"),
    "negative id": (serialized(vocab={"a": -1}, merges=[]), "token 'a': -1 is no id"),
    "huge id": (serialized(vocab={"a": 2**31}, merges=[]), "token 'a': 2147483648 is no id"),
    "same id": (serialized(vocab={"a": 0, "b": 0}, merges=[]), "tokens 'a' and 'b' have the same id 0"),
    "no pair": (serialized(merges=["a b c"]), "merge 1: 'a b c' is no pair"),
    "no text": (serialized(merges=[["a", 1]]), "merge 1: ['a', 1] is no pair"),
    "no result": (serialized(merges=[["z", "q"]]), "merge 1: ['z', 'q']: 'zq' is not in the vocabulary"),
    "prefix": (serialized(continuing_subword_prefix=5), "not a tokenizer"),
    "added taken": (serialized(added_tokens=[entry("<|mask|>", 3)]), "'<|mask|>' have the same id 3"),
    "added moved": (serialized(added_tokens=[entry("he", len(VOCAB))]), "added token 'he': id"),
    "added no id": (serialized(added_tokens=[entry("<|mask|>", "3")]), "token '<|mask|>': '3' is no id"),
    "added gap": (serialized(added_tokens=[entry("<|mask|>", len(VOCAB) + 9)]), f"id {len(VOCAB) + 9} is not the next"),
    "added half": (serialized(added_tokens=[{"id": 5}]), "not a tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_broken_tokenizer_json(tmp_path: Path, case: str) -> None:
    content, words = BROKEN_JSON[case]
    (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path, "tokenizer.json: ", words)


def test_a_panic_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a check of ours is passed by: its exception is no `Exception`."""
    monkeypatch.setattr(module, "_pairs", lambda *_: [(max(VOCAB, key=len), "z")])
    refused(write(tmp_path), "not a tokenizer: range end index")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_too_large(tmp_path: Path, name: str) -> None:
    with (write(tmp_path) / name).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    refused(tmp_path, f"{name}: {MAX_BYTES + 1} bytes, more than {MAX_BYTES}")


# ---- Texts that are refused ----


def unencodable(tokenizer: Tokenizer, text: str, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        encode(tokenizer, text)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place"), [("\udc80", 0), ("ab\ud800c", 2), (b"x\xff".decode(errors="surrogateescape"), 1)]
)
def test_what_is_not_unicode(dream: Tokenizer, text: str, place: int) -> None:
    unencodable(dream, text, f"character {place} ", "not valid Unicode")


def without(*characters: str) -> models.BPE:
    symbols = {symbol for c in characters for symbol in bytes_of(c)}
    kept = [token for token in VOCAB if not symbols & set(token)]
    merges = [(left, right) for left, right in MERGES if not symbols & set(left + right)]
    return models.BPE(vocab={token: index for index, token in enumerate(kept)}, merges=merges)


def bytes_of(text: str) -> str:
    return "".join(part for part, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))


@pytest.mark.parametrize(
    ("text", "lost"),
    [("a b", " "), ("quiz", "q"), ("x\nq", "\n"), ("été", "é"), ("e\u0301", "é"), ("本驩q", "驩"), ("👍👍q", "q")],
)
def test_a_vocabulary_that_lacks_bytes(text: str, lost: str) -> None:
    """BPE would drop them. A character is also lost if one of its bytes is."""
    tokenizer = built(without("q", " ", "\n", "é"))
    tokenizer.normalizer = normalizers.NFC()
    unencodable(tokenizer, text, f"{lost!r} (U+{ord(lost):04X})")
    assert decode(tokenizer, tokenizer.encode(text).ids) != unicodedata.normalize("NFC", text)


def test_what_a_small_vocabulary_holds() -> None:
    """The letters of an added token need not be in it."""
    tokenizer = built(without("q", "<", ">", "|", "_"), ["<q>", "<|mask|>", "<|im_start|>"])
    for text in ("", "the fox", "<q>", "a<q>b<|mask|><|im_start|>user"):
        assert decode(tokenizer, encode(tokenizer, text), False) == text
    unencodable(tokenizer, "<q>q", "'q'")
    unencodable(tokenizer, "<|mask|", "'<'")


@few
@given(text=texts)
def test_what_is_lost_is_refused(text: str) -> None:
    """Exactly the texts that do not come back."""
    lost = decode(_SMALL, _SMALL.encode(text).ids, False) != text
    if lost:
        unencodable(_SMALL, text)
    else:
        encode(_SMALL, text)


_SMALL = built(without("q", "é", "\t", "日"))


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(vocab={"?": 0, "a": 1, "b": 2}, merges=[], unk_token="?"),
        models.WordLevel(vocab={"?": 0, "a": 1, "b": 2}, unk_token="?"),
    ],
    ids=["BPE", "WordLevel"],
)
def test_unknown_tokens(model: models.Model) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    assert encode(tokenizer, "ab?a") == [1, 2, 0, 1]
    unencodable(tokenizer, "abca", "'c' (U+0063)")


def test_what_the_library_itself_refuses() -> None:
    unencodable(Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="?")), "b", "cannot encode the text: WordLevel")


def test_the_library_is_loaded_when_it_is_used() -> None:
    import subprocess

    code = "import sys, runtime.tokenizer; assert not {'tokenizers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- Chats ----

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be <brief> & 'kind'. "}, {"role": "user", "content": "  Hi\n"}],
    [
        {"role": "user", "content": "é 多\n\n👍"},
        {"role": "assistant", "content": "<|mask|>"},
        {"role": "system", "content": ""},
        {"role": "user", "content": "{{ 1 + 1 }}"},
    ],
]
TEMPLATES = {
    "chatml": CHATML,
    "variables": "{{ bos_token }}{{ eos_token }}{{ mask_token }}{{ image_token }}{{ nothing }}",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "json": "{{ messages | tojson }}\n{{ messages[0] | tojson(indent=2, sort_keys=true) }}\n",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m['role'] }}\n{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["dream", "older", "bare", "contradicting", "unnumbered"])
def test_chats(tmp_path: Path, kind: str, name: str, chat: list[dict[str, str]]) -> None:
    write(tmp_path, **KINDS[kind])
    expected = Qwen2Tokenizer.from_pretrained(str(tmp_path))
    assert special_tokens(tmp_path) == expected.special_tokens_map
    rendered = expected.apply_chat_template(
        chat, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert render_chat(TEMPLATES[name], chat, special_tokens(tmp_path)) == rendered


def test_the_date() -> None:
    from datetime import datetime

    year = render_chat("{{ strftime_now('%Y') }}", CHATS[0], {})
    assert abs(int(year) - datetime.now().year) <= 1


def test_special_tokens_of_a_tokenizer_json() -> None:
    folder = ROOT / "assets" / "dream_sudoku"
    expected = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert special_tokens(folder) == expected.special_tokens_map


LISTED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("in_config", "in_file", "expected"),
    [("C", None, "C"), (LISTED, None, "D"), ("C", "J\r\n", "J\n"), (LISTED, "J", "J"), (None, "J", "J")],
)
def test_where_a_template_comes_from(tmp_path: Path, in_config: object, in_file: str | None, expected: str) -> None:
    write(tmp_path, tokenizer_config={**FULL, **({} if in_config is None else {"chat_template": in_config})})
    if in_file is not None:
        (tmp_path / "chat_template.jinja").write_bytes(in_file.encode())
    assert chat_template(tmp_path) == expected
    assert Qwen2Tokenizer.from_pretrained(str(tmp_path)).get_chat_template() == expected


def test_no_template(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    assert chat_template(write(tmp_path, tokenizer_config=FULL)) is None


@pytest.mark.parametrize(
    "content", [5, [], ["x"], [{"name": "tool_use", "template": "T"}], [{"name": "default", "template": 1}]]
)
def test_templates_that_are_none(tmp_path: Path, content: object) -> None:
    write(tmp_path, tokenizer_config={"chat_template": content})
    refused(tmp_path, "tokenizer_config.json: chat_template: ", call=chat_template)


def test_a_template_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    refused(tmp_path, "chat_template.jinja: not UTF-8", call=chat_template)


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ a b }}", "{% for m in messages %}", "{% generation %}", "{{ x | none }}"]
)
def test_broken_templates(template: str) -> None:
    with pytest.raises(InputError, match=r"^the chat template is broken: .+$"):
        render_chat(template, CHATS[0], {})


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('first\nsecond') }}", "first second"),
        (CHATML.replace("'user', ", ""), "no role user"),
        ("{{ messages[0].none.content }}", "has no attribute 'none'"),
        ("{{ messages[0]['content'] + 1 }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set x = messages.append(1) %}", "unsafe"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_messages_that_a_template_does_not_take(template: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^the chat template does not take these messages: .+$") as caught:
        render_chat(template, CHATS[0], {})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chat_without_messages() -> None:
    with pytest.raises(UsageError, match="at least one message"):
        render_chat(CHATML, [], {})


# ---- End tokens ----

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ENDS: dict[str, tuple[str | None, list[str]]] = {
    "no template": (None, ["<|endoftext|>"]),
    "dream's": (TURN, ["<|endoftext|>", "<|im_end|>"]),
    "the eos token": (CHATML, ["<|endoftext|>", "<|endoftext|>"]),
    "after a line": (
        "{% for m in messages %}{{ m.content }}\n </tool_call>{% endfor %}",
        ["<|endoftext|>", "</tool_call>"],
    ),
    "only between turns": (
        "{{ messages | map(attribute='content') | join('<|im_end|>') }}",
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "no token": ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", ["<|endoftext|>"]),
    "as JSON": ("{{ messages | tojson }}", ["<|endoftext|>"]),
    "no answers": ("{{ messages[0].content }}<|im_end|>", ["<|endoftext|>"]),
    "other messages": ("{{ raise_exception('pictures only') }}", ["<|endoftext|>"]),
}


@pytest.mark.parametrize("case", ENDS)
def test_end_tokens(tmp_path: Path, case: str) -> None:
    """The tokenizer's own, and what the template writes after an answer, whatever it is called."""
    template, expected = ENDS[case]
    write(tmp_path, tokenizer_config=FULL | ({} if template is None else {"chat_template": template}))
    assert end_tokens(tmp_path, load_tokenizer(tmp_path)) == [IDS[token] for token in expected]


def test_end_tokens_of_an_instruct_tokenizer(tmp_path: Path) -> None:
    """Its `eos_token` is the end of turn; a token that it has not, and a folder without a tokenizer, have no id."""
    write(tmp_path, tokenizer_config=FULL | {"eos_token": "<|im_end|>"})
    assert end_tokens(tmp_path, load_tokenizer(tmp_path)) == [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    tokenizer = load_tokenizer(tmp_path)
    write(tmp_path, tokenizer_config=FULL | {"eos_token": "<|nowhere|>", "pad_token": None})
    assert end_tokens(tmp_path, tokenizer) == []
    assert end_tokens(tmp_path, None) == []


def test_what_an_answer_is_filled_up_with_ends_it(tmp_path: Path) -> None:
    """DiffuCoder's padding is a token of its own, of which its config knows nothing. A mask is no end."""
    write(tmp_path, tokenizer_config=FULL | {"pad_token": "<|im_start|>"})
    assert end_tokens(tmp_path, load_tokenizer(tmp_path)) == [IDS["<|endoftext|>"], IDS["<|im_start|>"]]
    write(tmp_path, tokenizer_config=FULL | {"pad_token": "<|mask|>", "mask_token": "<|mask|>"})
    assert end_tokens(tmp_path, load_tokenizer(tmp_path)) == [IDS["<|endoftext|>"]]


def test_a_broken_template_is_refused_with_its_folder(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config=FULL | {"chat_template": "{% if %}"})
    tokenizer = load_tokenizer(tmp_path)
    refused(tmp_path, "the chat template is broken", call=lambda folder: end_tokens(folder, tokenizer))
