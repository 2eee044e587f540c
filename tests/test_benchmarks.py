"""The benchmarks compare like with like: the floor and the peers give our numbers. No times are checked."""

import pytest

import mechinterp as mi
from benchmarks import attention, engines, shared_pass


@pytest.fixture(scope="module")
def work(smollm2: mi.Model) -> shared_pass.Work:
    return shared_pass.Work(smollm2, mi.tasks.ioi(4))


@pytest.fixture(scope="module")
def ours(work: shared_pass.Work) -> list[mi.Result]:
    return mi.run(work.model, work.examples, work.analyzers)


def test_the_floor_does_our_work(work: shared_pass.Work, ours: list[mi.Result]) -> None:
    assert shared_pass.difference(ours, shared_pass.floor(work)["floor"]()) <= 1e-5


@pytest.mark.parametrize("peer", shared_pass.PEERS)
@pytest.mark.filterwarnings("ignore")
def test_peers_do_our_work(peer: str, work: shared_pass.Work, ours: list[mi.Result]) -> None:
    read = shared_pass.PEERS[peer](work, str(work.model.hf.config._name_or_path))
    assert shared_pass.difference(ours, work.finish(read())) <= shared_pass.TOLERANCE


def test_eager_attention_does_our_work(smollm2: mi.Model) -> None:
    examples = attention.work(smollm2, 3, 40)
    peer = attention.theirs(attention.load("eager"), examples)
    assert attention.largest_difference(attention.ours(smollm2, examples), peer) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_attribution_patching_in_the_peers_own_idioms_is_ours(smollm2: mi.Model) -> None:
    work = engines.differentiating(smollm2, 2)
    expected = work.ours(smollm2)
    for name, peer in work.peers.items():
        assert engines.difference(peer(), expected) <= engines.TOLERANCE, name
    changed = {name: value + 2e-4 * abs(value).max() for name, value in expected.items()}
    assert engines.difference(changed, expected) > engines.TOLERANCE
