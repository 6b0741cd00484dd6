"""What CI tries with integers, with floats: `make test-extra`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_format import test_a_right_program_of_the_worst_shape_is_within_bounds as worst_shape
from tests.test_stored import test_the_same_program_as_from_memory as same_program


@pytest.mark.parametrize("recipe", ["fp16_xnnpack", "fp32_xnnpack"])
def test_the_same_program_as_from_memory(recipe: str, tmp_path: Path) -> None:
    same_program(recipe, tmp_path)


@pytest.mark.parametrize("recipe", ["fp16_xnnpack", "fp32_xnnpack"])
def test_a_right_program_of_the_worst_shape(recipe: str) -> None:
    worst_shape(recipe)
