"""Eager one layer at a time gives what the whole network gives, for every use of the contract."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import load_hf_model
from pipeline.config import load_recipe
from recipes.quantization import quantize_model
from recipes.stored import Weights, open_stored, store
from runtime.processor import native_float16
from tests.checkpoints import GOLDEN, ROOT
from validation import eager, output_layer, products, stream
from validation.activations import ActivationQuantization, quantized_activations
from validation.eager import run_by_layer
from validation.figures import kl_divergence, sqnr_db
from validation.logits import SKETCH, digest, summarize, top_columns
from validation.products import product, product_in_halves
from validation.recording import contract_sequences, short_candidates
from validation.reference import Call, Sequence, calls_of, n_tokens
from validation.stream import everywhere, once_each
from validation.ties import TieMargins

S = 96
PROMPTS = [torch.arange(5, 29) + i for i in range(8)]


@pytest.mark.parametrize("recipe", ["fp32_xnnpack", "int8_xnnpack", "int4_xnnpack", "fp16_xnnpack"])
@pytest.mark.parametrize("checkpoint", ["gqa2", "mha-tied"])
def test_it_is_the_network(checkpoint: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `DreamEdge.start` with torchao's own quantized tensors, call by call."""
    # Small enough that every loop is gone through several times.
    small = ((eager, "TOKENS", 7), (stream, "LONG", S), (output_layer, "ROWS", 20), (output_layer, "VOCAB", 100))
    for module, name, value in small:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(products, "SLICE", 50)
    blocks = load_recipe(recipe)
    model, _, config = load_hf_model(GOLDEN / checkpoint, dtype=None)
    list(store(model, blocks, tmp_path))
    weights = open_stored(tmp_path, model, blocks)
    whole, _, _ = load_hf_model(GOLDEN / checkpoint, dtype=None)
    quantize_model(whole, blocks.dtype, blocks.linear, blocks.embedding)
    contract = contract_sequences(PROMPTS, config.mask_token_id, S, S)
    repeated = contract_sequences(PROMPTS, config.mask_token_id, S, S, at_the_end=8)[-1]
    assert [len(everywhere(call).tokens) for call in repeated.calls] == [1, 8]
    assert [len(everywhere(call).tokens) for call in contract[-1].calls] == [S, 1]
    of_one_length = [Sequence("alone", (Call(prompt, 0, 24, torch.arange(24)),)) for prompt in PROMPTS[:3]]
    sequences = (*contract, repeated, *of_one_length, *short_candidates(PROMPTS, 2))
    found: dict[tuple[int, int], Tensor] = {}

    def take(i: int, j: int, logits_KV: Tensor) -> None:
        found[i, j] = logits_KV.clone()

    margins = run_by_layer(weights, sequences, take)
    assert [len(row) for row in margins] == [len(sequence.calls) for sequence in sequences]
    quantizes = blocks.linear is not None
    for i, sequence in enumerate(sequences):
        forward = whole.start(S)
        for j, call in enumerate(sequence.calls):
            with torch.no_grad():
                expected = forward(call.tokens, call.start_pos, call.kv_len, call.rows)[0]
            # Rounding alone, or after a tie the noise of int8 activations.
            floor = 110
            if blocks.dtype.value == "float16":  # torch's products of float16 round another way there, by their shapes
                floor = 55 if native_float16() else 60
            if quantizes and margins[i][j] < 1e-4:
                floor = 25
            assert sqnr_db(expected, found[i, j]) > floor, (sequence.name, j)
            assert math.isinf(margins[i][j]) != quantizes


def test_calls_that_see_the_same_are_computed_once() -> None:
    """Uses of the contract begin alike, and one writes a block twice; other rows of a call are no other call."""
    contract = contract_sequences(PROMPTS, 0, S, S, at_the_end=8)
    computed = {one.name: [len(call.tokens) for call in one.calls] for one in once_each(contract)}
    assert computed["prefill-then-block"] == [28, 28, 0]
    assert computed["rewrite-inside"] == [56, 14, 14]
    assert computed["suffix-hidden"] == [0, 14, 14]  # other tokens in its cache, and fewer of them
    assert computed["rows-subset"] == [0, 0]
    assert computed["one-inside"] == [0, 1, 1]
    assert n_tokens(contract) - n_tokens(once_each(contract)) == 28 + 4 * 56


def test_what_is_computed_once_is_what_each_call_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls that nobody planned: few tokens and places, so that many are equal, or nearly."""
    monkeypatch.setattr(stream, "LONG", 5)
    model, _, _ = load_hf_model(GOLDEN / "gqa2", dtype=torch.float32)
    random = torch.Generator().manual_seed(0)

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=random))

    sequences = []
    for _ in range(60):
        calls: list[Call] = []
        for written in range(1 + below(4)):
            start = below(6) if written else 0
            tokens = torch.randint(5, 5 + 1 + below(2), (1 + below(7),), generator=random)
            calls.append(Call(tokens, start, start + len(tokens) + (below(3) if written else 0), torch.tensor([0])))
        sequences.append(Sequence("any", tuple(calls)))
    found: list[dict[tuple[int, int], Tensor]] = [{}, {}]
    for kept, once in zip(found, (True, False), strict=True):

        def take(i: int, j: int, logits_KV: Tensor, kept: dict[tuple[int, int], Tensor] = kept) -> None:
            kept[i, j] = logits_KV

        run_by_layer(Weights(model, {}), tuple(sequences), take, once=once)
    kinds = [type(call) for call in calls_of(once_each(tuple(sequences)))]
    assert min(kinds.count(kind) for kind in (Call, stream.Again, stream.Everywhere)) > 5
    assert found[0].keys() == found[1].keys()
    assert min(sqnr_db(found[1][key], found[0][key]) for key in found[1]) > 110


@pytest.mark.parametrize("multiply", [product, product_in_halves])
def test_no_number_of_threads_changes_a_bit(multiply: Callable[..., Tensor]) -> None:
    """Also where a thread's part of a tensor is no multiple of a vector's width, and SiLU has another formula."""
    model, _, config = load_hf_model(GOLDEN / "gqa2", dtype=torch.float32)
    tokens = torch.randint(0, config.vocab_size, (211,), generator=torch.Generator().manual_seed(0))
    sequences = (Sequence("long", (Call(tokens, 0, 211, torch.arange(211)),)),)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        run_by_layer(Weights(model, {}), sequences, lambda _, __, logits: found.append(logits.exp()), multiply=multiply)
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], one) for one in found)


def test_activations_are_quantized_alike_by_any_number_of_threads() -> None:
    x_1ND = torch.randn(1, 700, 896, generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        ties = TieMargins(1400)
        quantization = ActivationQuantization(ties)
        found.append((*(quantization(nn.Identity(), (x,))[0] for x in (x_1ND, 2 * x_1ND)), ties.margin_N))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0], quantized_activations(x_1ND))
    assert found[0][2].isfinite().all()


def test_a_small_vocabulary_is_kept_whole() -> None:
    logits = torch.randn(3, SKETCH, generator=torch.Generator().manual_seed(0))
    kept = summarize(logits, top_columns(logits))
    assert torch.equal(kept.vector, logits)
    assert torch.equal(kept.values, logits)
    assert torch.equal(kept.top1, logits.argmax(-1))


@pytest.mark.parametrize("db", [10.0, 30.0, 110.0])
def test_a_sketch_measures_what_the_logits_would(db: float) -> None:
    """Signal to noise, cosine and divergence of a wide vocabulary, against all of its logits."""
    random = torch.Generator().manual_seed(0)
    K, V = 32, 50_000
    expected = 4 * torch.randn(K, V, generator=random)
    actual = expected + expected.std() * 10 ** (-db / 20) * torch.randn(K, V, generator=random)
    columns = top_columns(expected)
    e, a = summarize(expected, columns), summarize(actual, columns)
    assert e.vector.shape == (K, SKETCH)
    assert sqnr_db(e.vector, a.vector) == pytest.approx(sqnr_db(expected, actual), abs=0.2)
    cosine, kept = (1 - torch.cosine_similarity(*pair, dim=-1) for pair in ((expected, actual), (e.vector, a.vector)))
    if db < 100:
        torch.testing.assert_close(kept, cosine, rtol=0.2, atol=0)
    log_p, log_q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (kl_divergence(e, a) <= whole + 1e-9).all()
    assert (kl_divergence(e, a) > 0.25 * whole).all() or db > 100


def test_one_changed_logit_changes_sketch_and_digest() -> None:
    logits = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    changed = logits.clone()
    changed[1, 8999] += 1
    assert sqnr_db(summarize(logits).vector, summarize(changed).vector) < 60
    assert digest(logits) != digest(changed)
    assert digest(logits) == digest(logits.clone())


def test_the_kernels_are_numpys_whoever_else_has_a_blas() -> None:
    code = "import scipy.linalg, json; from validation.products import kernels; print(json.dumps(kernels()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == products.kernels()
