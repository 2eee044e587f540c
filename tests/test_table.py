"""The table of analyzers by name, and how other packages' analyzers come into it."""

import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

import mechinterp as mi
from mechinterp import analyzers
from mechinterp.errors import NeedsError


class Foreign(mi.Analyzer):
    """An analyzer that some other package has."""


def installed(monkeypatch: pytest.MonkeyPatch, **places: str) -> None:
    """As if packages with these entry points were installed; several places under one name are divided by commas."""
    found = EntryPoints(
        EntryPoint(name.replace("_", "-"), place, analyzers.GROUP)
        for name, all_places in places.items()
        for place in all_places.split(",")
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **chosen: found.select(**chosen))


def test_every_public_analyzer_is_in_the_table() -> None:
    public = {getattr(mi, name) for name in mi.__all__ if isinstance(getattr(mi, name), type)}
    every = {kind for kind in public if issubclass(kind, mi.Analyzer)} - {mi.Analyzer}
    assert {analyzers.find(name) for name in analyzers.TABLE} == every
    assert set(analyzers.TABLE) <= set(analyzers.names())


def test_the_table_imports_nothing() -> None:
    code = (
        "import sys; from mechinterp import analyzers; analyzers.names(); analyzers.locate('head-roles');"
        " print({'torch', 'numpy', 'pandas', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_analyzer_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, foreign="tests.test_table:Foreign", logit_lens="tests.test_table:Foreign")
    assert analyzers.find("foreign").__name__ == "Foreign"
    assert "foreign" in analyzers.names()
    assert analyzers.names().count("logit-lens") == 1
    assert analyzers.find("logit-lens") is mi.LogitLens  # a name of ours is always ours


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LogitLens", "did you mean 'logit-lens'"),
        ("xyzzy", r"no analyzer 'xyzzy'; known are ablation, .*logit-lens"),
        ("gone", r"'gone' cannot be imported from no_such_package:Gone \(ModuleNotFoundError: .*install"),
        ("moved", r"cannot be imported from tests.test_table:Moved \(AttributeError"),
        ("no-analyzer", "is tests.test_table:installed, which is no subclass of mechinterp.Analyzer"),
        ("twice", r"'twice' is in a:A and in b:B; uninstall"),
    ],
)
def test_what_is_not_found(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    installed(
        monkeypatch,
        gone="no_such_package:Gone",
        moved="tests.test_table:Moved",
        no_analyzer="tests.test_table:installed",
        twice="a:A,b:B",
    )
    with pytest.raises(NeedsError, match=said):
        analyzers.find(name)
