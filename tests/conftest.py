"""Shapes and types are checked at run time in every test: the hook must come before the first import."""

from tests.checking import install

install()

import pytest  # noqa: E402
import torch  # noqa: E402

import mechinterp as mi  # noqa: E402
from mechinterp.model.architecture import FAMILIES  # noqa: E402
from mechinterp.testing import tiny  # noqa: E402

torch.set_num_threads(1)  # tests run in several processes

_MODELS: dict[str, mi.Model] = {}


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> mi.Model:
    """A tiny random model, once for every family."""
    if request.param not in _MODELS:
        _MODELS[request.param] = tiny(request.param)
    return _MODELS[request.param]


@pytest.fixture(params=["llama", "qwen3_moe"])
def either(request: pytest.FixtureRequest) -> mi.Model:
    """The plainest family, and the one with most traits: for what takes long and does not depend on the family."""
    if request.param not in _MODELS:
        _MODELS[request.param] = tiny(request.param)
    return _MODELS[request.param]


@pytest.fixture(scope="session")
def llama() -> mi.Model:
    """A tiny random Llama."""
    return tiny("llama")


@pytest.fixture(scope="session")
def smollm2() -> mi.Model:
    """The real small model; `make test` installs it."""
    return mi.Model.load("smollm2")


@pytest.fixture
def ids(model: mi.Model) -> list[list[int]]:
    """Three sequences of nine random tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, model.dims.vocab, (3, 9), generator=generator).tolist()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's figures are not drawn as pictures, which take longer than all else; its page has them still."""
    monkeypatch.setattr("mechinterp.report.study.write_figures", lambda _, folder: folder.mkdir())
