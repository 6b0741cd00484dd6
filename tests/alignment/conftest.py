"""`pytest tests/alignment --checkpoint DIR` runs the tests that ask for `network` on that checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model import DreamEdge, DreamEdgeConfig, load_hf_model

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_NAMES = ("gqa2", "mha-tied", "mqa4-sharded")


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest reads options from the conftest files of its arguments: a plain `pytest` does not have this one.
    parser.addoption("--checkpoint", metavar="DIR", help="a Dream checkpoint to test, in place of the golden ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "checkpoint" in metafunc.fixturenames:
        given = metafunc.config.getoption("checkpoint", default=None)
        folders = [Path(given)] if given else [GOLDEN / name for name in GOLDEN_NAMES]
        ids = [folder.resolve().name for folder in folders]
        metafunc.parametrize("checkpoint", folders, ids=ids, indirect=True, scope="session")
    if "golden" in metafunc.fixturenames and "case" not in metafunc.fixturenames:
        metafunc.parametrize("golden", GOLDEN_NAMES, indirect=True, scope="session")


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each golden checkpoint, or the one given with --checkpoint."""
    return request.param


@pytest.fixture(scope="session")
def network(checkpoint: Path) -> DreamEdge:
    return load_hf_model(checkpoint, dtype=torch.float32)[0]


class Golden(NamedTuple):
    folder: Path
    network: DreamEdge


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden checkpoint, whatever --checkpoint says."""
    folder = GOLDEN / request.param
    return Golden(folder, load_hf_model(folder)[0])


@pytest.fixture(scope="session")
def random_network() -> Callable[[DreamEdgeConfig, int], DreamEdge]:
    """Makes a network with weights large enough that attention is far from uniform, and every bias matters."""

    def make(config: DreamEdgeConfig, seed: int) -> DreamEdge:
        random = torch.Generator().manual_seed(seed)
        network = DreamEdge(config).requires_grad_(False).eval()
        for name, weight in network.named_parameters():
            drawn = torch.randn(weight.shape, generator=random)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * drawn)
            elif weight.dim() == 1:
                weight.copy_(0.5 * drawn)
            elif name == "embed_tokens.weight" and not config.tie_word_embeddings:
                weight.copy_(drawn)
            else:
                weight.copy_(1.5 * drawn / weight.shape[-1] ** 0.5)
        return network

    return make


@pytest.fixture(scope="session")
def same_logits(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor], None]:
    """Asserts that float32 logits differ by rounding only.

    1e-4, as the golden data asks for. A real checkpoint is deeper and wider, and its rounding errors grow with
    the values that it computes: there 1e-4 of the largest logit.
    """
    given = request.config.getoption("checkpoint", default=None)

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.isfinite().all()
        atol = 1e-4
        if given and expected.numel():
            atol *= max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)

    return check
