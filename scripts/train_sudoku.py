"""Train the bundled checkpoint: a small Dream that completes 4x4 sudokus written as text.

    python scripts/train_sudoku.py --output assets/dream_sudoku --prompts assets/tasks/sudoku.jsonl

The puzzle is four lines of digits, 0 = blank; the answer has the same form and follows directly:

    1003            1423
    0300     ->     2314
    3210            3241
    4132            4132

Everything is made here from fixed seeds: the 288 grids, the puzzles, the tokenizer, the weights. One puzzle in
ten, chosen by the hash of its text, is held out: training never sees it, the closing test uses only those.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from model import DreamEdge, DreamEdgeConfig
from model.checkpoint import hf_name
from pipeline.config import ASSETS
from runtime import generate
from validation.tasks import load_checker

log = logging.getLogger("train_sudoku")

CHECKER = ASSETS / "tasks" / "sudoku.py"

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
VOCAB_SIZE = 288  # 256 bytes, the special tokens, and reserved ones up to a multiple of 32
CONFIG = DreamEdgeConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rope_theta=10000.0,
    mask_token_id=259,
    pad_token_id=256,
    bos_token_id=256,
    eos_token_id=256,
)
# Qwen2's own splitting, so that the tokenizer is of the kind that a real Dream checkpoint has.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CELLS = 16
TEXT_LEN = 19  # 16 digits and 3 line ends
MAX_EOS = 26  # the answer is followed by 0..26 end-of-text tokens: up to 64 positions in all
MIN_MASK_RATIO = 1e-3


def all_grids() -> Tensor:
    """Every solved 4x4 sudoku, int64 [288, 16]."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    grids = [
        sum(grid, ())
        for grid in itertools.product(rows, repeat=4)
        if all(len({row[c] for row in grid}) == 4 for c in range(4))
        and all(
            len({grid[r + i][c + j] for i in (0, 1) for j in (0, 1)}) == 4 for r, c in itertools.product((0, 2), (0, 2))
        )
    ]
    return torch.tensor(grids)


def to_text(cells: Tensor) -> str:
    digits = [str(int(c)) for c in cells]
    return "\n".join("".join(digits[i : i + 4]) for i in range(0, CELLS, 4))


def is_held_out(puzzle: Tensor) -> bool:
    return hashlib.sha256(to_text(puzzle).encode()).digest()[0] % 10 == 0


def puzzles(grids: Tensor, held_out: bool, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(puzzle, grid), int64 [16] each, without end: a random grid with 2 to 12 random cells blanked."""
    while True:
        grid = grids[int(torch.randint(len(grids), (1,), generator=generator))]
        n_blanks = int(torch.randint(2, 13, (1,), generator=generator))
        puzzle = grid.clone()
        puzzle[torch.randperm(CELLS, generator=generator)[:n_blanks]] = 0
        if is_held_out(puzzle) == held_out:
            yield puzzle, grid


def to_tokens(cells: Tensor) -> Tensor:
    """The bytes of the texts of [N, 16] cells: int64 [N, 19]. A byte is its own token id."""
    lines = (cells + ord("0")).view(-1, 4, 4)
    ends = torch.full((len(lines), 4, 1), ord("\n"))
    return torch.cat([lines, ends], dim=-1).view(-1, 20)[:, :TEXT_LEN]


def qwen2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def make_tokenizer(special: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Byte-level, built as Qwen2's is, with no merges: every byte is a token, and its id. special: ids from 256 on."""
    # The byte-level alphabet shows byte b as a printable character; ids follow the bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {b: chr(b) for b in printable}
    shown |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    tokenizer = Tokenizer(models.BPE(vocab={shown[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = qwen2_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{i}|>" for i in range(256 + len(special), VOCAB_SIZE)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in [*special, *reserved]])
    return tokenizer


def init_weights(model: DreamEdge) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 if "embed" in name or "lm_head" in name else 1 / math.sqrt(parameter.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * model.config.num_hidden_layers)
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)


def mask_ratios(B: int, generator: torch.Generator) -> Tensor:
    """float32 [B], one from each of B equal slices of (0, 1]: even, with less variance than B alone."""
    t_B = (torch.arange(B) + torch.rand(B, generator=generator)) / B
    return t_B.clamp_min(MIN_MASK_RATIO)


def diffusion_loss(model: DreamEdge, tokens_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Dream's loss: mask each answer token with probability t, weigh by 1/t."""
    B, T = tokens_BT.shape
    t_B = mask_ratios(B, generator)
    masked = torch.rand(B, T, generator=generator) < t_B[:, None]
    masked[:, :TEXT_LEN] = False
    return weighted_loss(model, tokens_BT, masked, t_B) / (B * (T - TEXT_LEN))


def weighted_loss(model: DreamEdge, tokens_BT: Tensor, masked_BT: Tensor, t_B: Tensor) -> Tensor:
    """The sum over what is masked, each 1/t of its sequence's ratio t; position i is read from row i-1."""
    logits, _ = model(tokens_BT.masked_fill(masked_BT, model.config.mask_token_id))
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    loss_N = F.cross_entropy(shifted[masked_BT], tokens_BT[masked_BT], reduction="none")
    weight_N = (1 / t_B)[:, None].expand(masked_BT.shape)[masked_BT]
    return (loss_N * weight_N).sum()


def held_out_puzzles(n: int, seed: int) -> list[str]:
    """n different puzzles that training never sees."""
    stream = puzzles(all_grids(), True, torch.Generator().manual_seed(seed))
    texts: dict[str, None] = {}
    while len(texts) < n:
        texts[to_text(next(stream)[0])] = None
    return list(texts)


def share_solved(model: DreamEdge, texts: list[str]) -> float:
    """Of these puzzles: a filled, valid grid that keeps the givens counts."""
    check = load_checker(CHECKER)
    prompts = [list(text.encode()) for text in texts]
    answers = generate(model, prompts, max_new_tokens=TEXT_LEN, threshold=0.9).answers
    return sum(check(text, "".join(map(chr, answer))) for text, answer in zip(texts, answers, strict=True)) / len(texts)


def make_optimizer(model: DreamEdge, lr: float) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(args: argparse.Namespace) -> DreamEdge:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    stream = puzzles(all_grids(), False, generator)
    model = DreamEdge(CONFIG)
    init_weights(model)
    optimizer = make_optimizer(model, args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            batch = list(itertools.islice(stream, args.batch))
            n_eos = int(torch.randint(0, MAX_EOS + 1, (1,), generator=generator)) if step % 4 == 0 else 1
            tokens = torch.cat(
                [
                    to_tokens(torch.stack([p for p, _ in batch])),
                    to_tokens(torch.stack([g for _, g in batch])),
                    torch.full((len(batch), n_eos), CONFIG.eos_ids[0]),
                ],
                dim=1,
            )
            loss = diffusion_loss(model, tokens, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"training  loss {loss.item():.4f}")
            if (step + 1) % args.check_every == 0:
                share = share_solved(model.eval(), held_out_puzzles(250, seed=step))
                log.info(
                    "step %d: loss %.4f, solves %.1f%% of 250 held-out puzzles", step + 1, loss.item(), 100 * share
                )
                model.train()
    return model.eval()


def save(model: DreamEdge, output: Path, tokenizer: Tokenizer | None = None) -> None:
    """HF layout, weights in bfloat16 as real Dream checkpoints have them."""
    output.mkdir(parents=True, exist_ok=True)
    state = {hf_name(name): tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    (tokenizer or make_tokenizer()).save(str(output / "tokenizer.json"))
    write_configs(model.config, output)


def write_configs(config: DreamEdgeConfig, output: Path) -> None:
    """Those that lie beside the weights and tokenizer.json."""
    ids = {name: getattr(config, name) for name in ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")}
    write_json(output / "config.json", {**config.to_hf(), "torch_dtype": "bfloat16"})
    write_json(output / "generation_config.json", ids)
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "mask_token": "<|mask|>",
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": config.max_position_embeddings,
        },
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, help="file of the 1,000 puzzles of the closing test")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-every", type=int, default=500, help="steps between two tests on held-out puzzles")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    started = time.monotonic()
    model = train(args)
    save(model, args.output)
    stored = model.bfloat16().float()  # what the file holds
    held_out = held_out_puzzles(1000, seed=2**31)
    args.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in held_out), encoding="utf-8")
    share = share_solved(stored, held_out)
    log.info("solves %.1f%% of 1,000 held-out puzzles; %.1f minutes", 100 * share, (time.monotonic() - started) / 60)


if __name__ == "__main__":
    main()
