"""Train a small Dream on English, as `assets/dream_english` was: corpus, tokenizer and weights from nothing.

    python -m scripts.train_english --output DIR --seconds 250 --device cuda
    python -m scripts.train_english --output DIR --seconds 3600 --corpus FOLDER

The text is that of the documentation packages that are installed (assets/dream_english/README.md names them), or of
any folders. One document in 50, chosen by the hash of its text, is held out: neither tokenizer nor weights see it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from model import ConfigError, DreamEdge, DreamEdgeConfig
from model.checkpoint import hf_name
from model.checkpoint_files import INDEX
from scripts.english_corpus import DEBIAN, CorpusError, Document, read_corpus
from scripts.make_checkpoint import n_bytes, read_shape, shapes, split
from scripts.train_sudoku import (
    SPECIAL_TOKENS,
    init_weights,
    make_optimizer,
    mask_ratios,
    qwen2_pre_tokenizer,
    weighted_loss,
    write_configs,
    write_json,
)

log = logging.getLogger("train_english")

VOCAB_SIZE = 8192
CONFIG = DreamEdgeConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    mask_token_id=VOCAB_SIZE - 1,
    pad_token_id=VOCAB_SIZE - 4,
    bos_token_id=VOCAB_SIZE - 4,
    eos_token_id=VOCAB_SIZE - 4,
)
LR = 3e-3
WARM_UP = 0.07  # of the time
AFTER_PREFIX, IN_MIDDLE = 0.45, 0.15  # shares of the sequences
TOKENIZER_TEXT = 20_000_000  # characters that the tokenizer learns from
HELD_OUT, CALIBRATION = 284, 530  # paragraphs that are saved
PARAGRAPH = range(40, 257)  # tokens of one
RATIOS = (0.15, 0.5)


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """Qwen2's kind, with the special tokens as the last ids. Reserved ones fill up what a short text leaves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = qwen2_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    n_learned = vocab_size - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=n_learned, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    mixed = random.Random(0).sample(documents, len(documents))
    tokenizer.train_from_iterator(_first(mixed, TOKENIZER_TEXT), trainer)
    reserved = [f"<|reserved_{i}|>" for i in range(tokenizer.get_vocab_size(), n_learned)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in reserved + SPECIAL_TOKENS])
    return tokenizer


def _first(documents: Iterable[Document], n_characters: int) -> Iterator[str]:
    for document in documents:
        yield from document
        n_characters -= sum(map(len, document))
        if n_characters <= 0:
            return


def to_stream(tokenizer: Tokenizer, documents: list[Document], end: int) -> Tensor:
    """All documents one after the other, each with its end token: int32 [N]."""
    parts = []
    for first in track(range(0, len(documents), 64), "tokenizing", transient=True):  # an Encoding is many times its ids
        texts = ["\n\n".join(document) for document in documents[first : first + 64]]
        ids = [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, end)]
        parts.append(torch.tensor(ids, dtype=torch.int32))
    return torch.cat(parts)


def choose_masks(B: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What is masked, bool [B, T], out of what may be, bool [B, T], and with which probability, float32 [B]."""
    t_B = mask_ratios(B, generator)
    kind_B = torch.rand(B, generator=generator)
    a_B, b_B = torch.randint(T, (2, B), generator=generator)
    is_after, is_middle = kind_B < AFTER_PREFIX, (kind_B >= AFTER_PREFIX) & (kind_B < AFTER_PREFIX + IN_MIDDLE)
    start_B = torch.where(is_after, a_B, torch.where(is_middle, torch.minimum(a_B, b_B), 0))
    last_B = torch.where(is_middle, torch.maximum(a_B, b_B), T - 1)
    position_T = torch.arange(T)
    region_BT = (position_T >= start_B[:, None]) & (position_T <= last_B[:, None])
    masked_BT = region_BT & (torch.rand(B, T, generator=generator) < t_B[:, None])
    return masked_BT, region_BT, t_B


def learning_rate(share: float) -> float:
    """share: of the time that is over. Warm-up, then level, then down to 0 over the second half."""
    return LR * min(1.0, (share + 1e-3) / WARM_UP, 2 * (1 - share))


def train(model: DreamEdge, stream: Tensor, args: argparse.Namespace) -> int:
    """For `args.seconds`, or a little longer: whole steps. Returns how many. stream: int32 [N], N > args.length."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = make_optimizer(model, LR)
    stream = stream.to(device)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=args.seconds)
        started, step = time.monotonic(), 0
        while (elapsed := time.monotonic() - started) < args.seconds:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(elapsed / args.seconds)
            first_B = torch.randint(len(stream) - args.length, (args.batch, 1), generator=generator)
            tokens_BT = stream[(first_B + torch.arange(args.length)).to(device)].long()
            masked_BT, region_BT, t_B = choose_masks(args.batch, args.length, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = weighted_loss(model, tokens_BT, masked_BT.to(device), t_B.to(device)) / region_BT.sum().item()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.update(task, completed=elapsed, description=f"training  step {step}  loss {loss.item():.3f}")
    return step


@torch.no_grad()
def figures(model: DreamEdge, paragraphs: list[Tensor], ratio: float, seed: int = 0) -> tuple[float, float]:
    """Loss in nats and share right of the masked tokens, with `ratio` of each paragraph's masked (at least one).

    paragraphs: int64 [T] each. The positions are those of `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    losses, right = [], []
    for tokens_T in paragraphs:
        chosen = torch.randperm(len(tokens_T), generator=generator)[: max(1, round(ratio * len(tokens_T)))]
        input_T = tokens_T.index_fill(0, chosen, model.config.mask_token_id)
        logits_TV = model(input_T[None].to(model.lm_head.weight.device))[0][0].cpu()
        rows_NV, true_N = logits_TV[(chosen - 1).clamp_min(0)], tokens_T[chosen]
        losses.append(torch.nn.functional.cross_entropy(rows_NV, true_N, reduction="none"))
        right.append(rows_NV.argmax(-1) == true_N)
    return torch.cat(losses).mean().item(), torch.cat(right).float().mean().item()


def choose_paragraphs(tokenizer: Tokenizer, documents: list[Document], n: int, seed: int) -> list[str]:
    """Up to n of the length of `PARAGRAPH`, from anywhere; if there are none, the longest of all."""
    texts = [text for document in documents for text in document]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[str] = []
    for i in order:
        if len(chosen) < n and len(tokenizer.encode(texts[i]).ids) in PARAGRAPH:
            chosen.append(texts[i])
    return chosen or [max(texts, key=len)]


def save(model: DreamEdge, tokenizer: Tokenizer, output: Path) -> None:
    """HF layout as of a large checkpoint: bfloat16, two shards and their index, three quarters in the first."""
    tensors = shapes(model.config)
    total = sum(map(n_bytes, tensors.values()))
    state = {hf_name(name): parameter.detach().cpu().bfloat16() for name, parameter in model.named_parameters()}
    shards = list(split(tensors, math.ceil(0.75 * total)))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: state[name].contiguous() for name in shard}, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    tokenizer.save(str(output / "tokenizer.json"))
    write_configs(model.config, output)


def save_texts(texts: list[str], file: Path) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    file.write_text("".join(lines), encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Raises `CorpusError`, `ConfigError` for sizes that cannot be, and `OSError` for files that cannot be."""
    config = CONFIG if args.shape is None else with_last_ids(read_shape(args.shape))
    if args.length > config.max_position_embeddings:
        raise ConfigError(f"--length {args.length} is beyond max_position_embeddings, {config.max_position_embeddings}")
    args.output.mkdir(parents=True, exist_ok=True)
    if any(args.output.iterdir()):
        raise FileExistsError(f"{args.output} is not empty")
    corpus = read_corpus(args.corpus or DEBIAN)
    log.info("%d documents to train on, %d held out", len(corpus.trained), len(corpus.held_out))
    tokenizer = train_tokenizer(corpus.trained, config.vocab_size)
    stream = to_stream(tokenizer, corpus.trained, config.eos_ids[0])
    if len(stream) <= args.length:
        raise CorpusError(f"{len(stream)} tokens to train on are too few for sequences of {args.length}: see --length")
    log.info("%s tokens to train on", f"{len(stream):,}")
    torch.manual_seed(args.seed)
    model = DreamEdge(config)
    init_weights(model)
    n_steps = train(model.to(args.device), stream, args)
    held_out = choose_paragraphs(tokenizer, corpus.held_out, HELD_OUT, args.seed)
    save(model, tokenizer, args.output)
    save_texts(held_out, args.output / "held_out_paragraphs.jsonl")
    calibration = choose_paragraphs(tokenizer, corpus.trained, CALIBRATION, args.seed)
    save_texts(calibration, args.output / "calibration_paragraphs.jsonl")
    log.info("%d steps of %s tokens", n_steps, f"{args.batch * args.length:,}")
    stored = model.eval().bfloat16().float()  # what the file holds
    tokens = [torch.tensor(tokenizer.encode(text).ids) for text in held_out]
    for ratio in RATIOS:
        loss, right = figures(stored, tokens, ratio)
        log.info(
            "%d held-out paragraphs, %.0f%% masked: loss %.3f nats, %.1f%% right",
            len(tokens),
            100 * ratio,
            loss,
            100 * right,
        )


def with_last_ids(config: DreamEdgeConfig) -> DreamEdgeConfig:
    """The same sizes, and the special tokens where `train_tokenizer` puts them. Raises `ConfigError`."""
    least, size = 256 + len(SPECIAL_TOKENS), config.vocab_size
    if size < least:
        raise ConfigError(f"vocab_size must be at least {least}, all bytes and the special tokens, got {size}")
    end = size - len(SPECIAL_TOKENS)
    return replace(config, mask_token_id=size - 1, pad_token_id=end, bos_token_id=end, eos_token_id=end)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the checkpoint; must not exist or be empty"
    )
    parser.add_argument("--seconds", type=float, required=True, help="of training; reading and tokenizing come before")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--corpus", type=Path, nargs="+", help="folders of text; default: Debian's documentation")
    parser.add_argument("--shape", type=Path, help="YAML of other sizes, see conf/shape/")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, help="sequences of a step; default: 256 on cuda, 8 on cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.batch = args.batch or (256 if args.device == "cuda" else 8)
    if not args.seconds > 0 or args.length < 1 or args.batch < 1:
        parser.error("--seconds, --length and --batch must be above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds none here")
    for folder in args.corpus or ():
        if not folder.is_dir():
            parser.error(f"--corpus: {folder} is no folder")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    try:
        run(args)
    except (CorpusError, ConfigError, OSError) as error:
        sys.exit(f"train_english: {error}")


if __name__ == "__main__":
    main()
