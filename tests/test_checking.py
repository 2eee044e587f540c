"""What the tests themselves rely on: a wrong type or shape raises, wherever mechinterp's own code is handed one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tests.checking import CheckedLoader

MODULE = '''
"""A module."""
from dataclasses import dataclass
from typing import TYPE_CHECKING
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown


def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    return a @ b


def wrong(a: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    return a.T


def unknown(a: "Unknown", b: "int") -> None: ...


@dataclass(frozen=True)
class Pair:
    a: Float[Tensor, "n"]
    b: Float[Tensor, "n"]

    @property
    def name(self) -> int:
        return "pair"

    @classmethod
    def of(cls, a: str) -> "Pair": ...
'''


def test_types_and_shapes_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "checked_module.py"
    path.write_text(MODULE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        "checked_module", path, loader=CheckedLoader("checked_module", str(path))
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules["checked_module"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        two, three = torch.zeros(4, 2), torch.zeros(2, 3)
        assert module.product(two, three).shape == (4, 3)
        pair = module.Pair(torch.zeros(2), torch.zeros(2))
        module.unknown(object(), 1)
        module.wrong(torch.zeros(2, 2))
        for bad in (
            lambda: module.product(two, two),
            lambda: module.product(two.int(), three),
            lambda: module.wrong(two),
            lambda: module.unknown(object(), "1"),
            lambda: module.Pair(torch.zeros(2), torch.zeros(3)),
            lambda: pair.name,
            lambda: module.Pair.of(1),
            lambda: module.Pair.of("1"),
        ):
            with pytest.raises(TypeError):
                bad()
    finally:
        del sys.modules["checked_module"]
    assert not list(tmp_path.rglob("*.pyc"))


def test_mechinterp_is_checked() -> None:
    import mechinterp as mi

    with pytest.raises(TypeError):
        mi.Examples.of(3)  # pyright: ignore[reportArgumentType]
