"""The bundled checkpoint: really trained, on puzzles that the test does not use."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from model import DreamEdge, load_hf_model
from recipes.stored import Weights
from scripts import train_sudoku as training
from tests.checkpoints import BUNDLED, ROOT
from validation.float32 import task_answers
from validation.progress import silent
from validation.reference import Task
from validation.replay import solve
from validation.tasks import load_checker, read_prompts

PROMPTS = ROOT / "assets" / "tasks" / "sudoku.jsonl"
sudoku = load_checker(PROMPTS.with_suffix(".py"))


def test_it_is_a_small_dream_checkpoint_in_hf_layout() -> None:
    model, model_type, config = load_hf_model(BUNDLED, dtype=None)
    assert model_type == "Dream"
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 8e6
    assert model.lm_head.weight.dtype == torch.bfloat16
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim]
    assert all(size % 32 == 0 for size in sizes)
    assert {file.name for file in BUNDLED.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_solves_what_it_was_not_trained_on() -> None:
    """At least 99% of 1,000 held-out puzzles, in float32."""
    model, _, _ = load_hf_model(BUNDLED)
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    prompts = read_prompts(PROMPTS)
    assert len(set(prompts)) == 1000
    task = Task(tuple(torch.tensor(tokenizer.encode(prompt).ids) for prompt in prompts), 19, threshold=0.9)
    found = task_answers(Weights(model, {}), task, silent)
    alone = solve(model, replace(task, prompts=task.prompts[:50]))
    assert torch.equal(found.tokens[:50], alone.tokens)
    assert torch.equal(found.steps[:50], alone.steps[:, : found.steps.shape[1]])
    answers = [tokenizer.decode(answer.tolist()) for answer in found.tokens]
    solved = sum(itertools.starmap(sudoku, zip(prompts, answers, strict=True)))
    assert solved >= 990


def test_the_prompts_are_held_out() -> None:
    for prompt in read_prompts(PROMPTS):
        cells = torch.tensor([int(c) for c in prompt if c != "\n"])
        assert training.to_text(cells) == prompt
        assert training.is_held_out(cells)
    grids = training.all_grids()
    assert grids.shape == (288, 16)
    drawn = itertools.islice(training.puzzles(grids, False, torch.Generator().manual_seed(0)), 300)
    assert not any(training.is_held_out(puzzle) for puzzle, _ in drawn)


def test_the_grids_are_sudokus() -> None:
    texts = [training.to_text(grid) for grid in training.all_grids()]
    assert len(set(texts)) == 288
    assert all(sudoku(text, text) for text in texts)


@pytest.mark.parametrize(
    "text", ["1003\n0300\n3210\n4132", "héllo wörld 数独 🧩\t\r\n  x", "", "<|mask|>1<|endoftext|>"]
)
def test_the_tokenizer_holds_any_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    plain = text.replace("<|mask|>", "").replace("<|endoftext|>", "")
    assert [i for i in ids if i < 256] == list(plain.encode())


def test_the_special_tokens_are_the_configs() -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    config = json.loads((BUNDLED / "config.json").read_text())
    names = json.loads((BUNDLED / "tokenizer_config.json").read_text())
    for kind in ("mask", "pad", "bos", "eos"):
        assert tokenizer.token_to_id(names[f"{kind}_token"]) == config[f"{kind}_token_id"]
    assert tokenizer.get_vocab_size() == config["vocab_size"]


def test_training_learns() -> None:
    """The loss of the script, on a fixed batch: one step down its gradient lowers it."""
    torch.manual_seed(0)
    model = DreamEdge(training.CONFIG)
    training.init_weights(model)
    stream = training.puzzles(training.all_grids(), False, torch.Generator().manual_seed(0))
    batch = list(itertools.islice(stream, 16))
    tokens = torch.cat([training.to_tokens(torch.stack(cells)) for cells in zip(*batch, strict=True)], dim=1)

    def loss() -> torch.Tensor:
        return training.diffusion_loss(model, tokens, torch.Generator().manual_seed(1))

    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.01 * parameter.grad)
        assert loss() < before
