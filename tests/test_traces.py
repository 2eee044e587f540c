"""Traces as files: what comes back is what was saved, or an error that says why not."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.trace import Read, Reduce
from mechinterp.errors import OutputError
from mechinterp.report import files
from mechinterp.testing import tiny


def same(one: mi.Trace, other: mi.Trace) -> None:
    assert one.reads == other.reads
    for read in one.reads:
        assert one[read].dtype == other[read].dtype
        assert torch.equal(one[read].nan_to_num(7), other[read].nan_to_num(7))
    for name, value in vars(one.batch).items():
        back = getattr(other.batch, name)
        assert type(back) is type(value), name
        assert (torch.equal(back, value) and back.dtype == value.dtype) if torch.is_tensor(value) else back == value


def siblings(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def trace(request: pytest.FixtureRequest) -> mi.Trace:
    """Reads of every shape from padded pairs with answers, labels, named positions and spans."""
    model = tiny("llama", dtype=request.param)
    texts = [[5, 6, 7, 8, 9], [9, 8, 7]]
    examples = mi.Examples.pairs(
        texts,
        [[*t[:-1], 11] for t in texts],
        answers=[(3, [4, 5]), ([6, 7], 8)],
        positions={"S1": [(0, 2), (1, 2)], "a, b@c é": [(0, 1), (0, 1)]},
        spans={"subject": [(1, 4), (0, 2)]},
        labels=["</script>", (1, None, float("inf"))],
    )
    reads = [
        "resid_post.0",
        "resid_pre.1",  # may share its memory with the one before
        Read(sites.resid_post(0), of="corrupted"),
        sites.k(1),
        sites.k(1, per_query_head=True),
        sites.z(2, heads=(1,), positions=("S1", -1)),
        sites.z(2, heads=3, positions="end"),
        sites.z(2, heads=3, positions="a, b@c é"),
        sites.mlp_out(1, positions="subject"),
        sites.resid_post(1, positions=(0, "end")),
        sites.pattern(1, positions="S1"),
        sites.logits(),
    ]
    return model.trace(examples, reads)


def test_a_trace_comes_back_exactly(trace: mi.Trace, tmp_path: Path) -> None:
    assert trace["resid_post.1"].isfinite().all()
    back = mi.Trace.load(trace.save(tmp_path / "t"))
    same(trace, back)
    assert torch.equal(back[sites.z(2, heads=3, positions="end")], trace[sites.z(2, heads=3, positions="end")])
    assert back.batch.two_sided
    assert torch.equal(back.batch.run("corrupted").ids, trace.batch.run("corrupted").ids)
    assert siblings(tmp_path / "t") == ["t"]
    json.loads((tmp_path / "t" / "trace.json").read_text(), parse_constant=pytest.fail)
    same(trace, mi.Trace.load(back.save(tmp_path / "again")))


def test_every_site_comes_back_on_every_family(model: mi.Model, ids: list[list[int]], tmp_path: Path) -> None:
    trace = model.trace([ids[0], ids[1][:4]], model.sites)
    same(trace, mi.Trace.load(trace.save(tmp_path / "t")))


def test_so_does_what_was_read_while_generating(llama: mi.Model, tmp_path: Path) -> None:
    trace = llama.generate([5, 6, 7], max_new_tokens=3, reads=[sites.z(1, positions="end"), "pattern.1"]).trace
    same(trace, mi.Trace.load(trace.save(tmp_path / "t")))


def test_a_saved_trace_owns_its_numbers(llama: mi.Model, tmp_path: Path) -> None:
    trace = llama.trace([5, 6, 7], ["resid_post.0", "resid_pre.1"])
    trace.save(tmp_path / "t")
    back = mi.Trace.load(tmp_path / "t")
    back["resid_post.0"].zero_()
    assert torch.equal(back["resid_pre.1"], trace["resid_pre.1"])
    assert torch.equal(mi.Trace.load(tmp_path / "t")["resid_post.0"], trace["resid_post.0"])


def total(block: torch.Tensor, queries: slice, batch: mi.TokenBatch) -> torch.Tensor:
    return block.sum((2, 3))


def test_what_a_file_cannot_hold_is_refused(llama: mi.Model, tmp_path: Path) -> None:
    reduced = llama.trace([5, 6, 7], ["z.0", Read(sites.pattern(1), reduce=Reduce(total, "example head"))])
    with pytest.raises(OutputError, match=r"pattern\.1 was reduced to 'example head' by a function.*save the Result"):
        reduced.save(tmp_path / "t")
    labelled = llama.trace(mi.Examples.of([[5, 6]], labels=[object()]), "z.0")
    with pytest.raises(OutputError, match="labels holds a object"):
        labelled.save(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_and_never_touches_what_is_not_ours(llama: mi.Model, tmp_path: Path) -> None:
    llama.trace([5, 6, 7], "z.0").save(tmp_path / "t")
    llama.trace([5, 6, 7], "z.1").save(tmp_path / "t")
    assert [str(site) for site in mi.Trace.load(tmp_path / "t")] == ["z.1"]
    (tmp_path / "t" / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.md"):
        llama.trace([5, 6, 7], "z.0").save(tmp_path / "t")
    assert [str(site) for site in mi.Trace.load(tmp_path / "t")] == ["z.1"]
    with pytest.raises(OutputError, match=r"holds no saved result \(no result\.json\)"):
        mi.Result.load(tmp_path / "t")


def test_damaged_files_are_one_sentence(llama: mi.Model, tmp_path: Path) -> None:
    for nothing in (tmp_path, tmp_path / "gone"):
        with pytest.raises(OutputError, match=r"no saved trace \(no trace\.json\); give a folder that Trace\.save"):
            mi.Trace.load(nothing)
    folder = llama.trace([5, 6, 7], ["z.0", "resid_post.1"]).save(tmp_path / "t")
    numbers, text = folder / "tensors.safetensors", folder / "trace.json"
    whole, words = numbers.read_bytes(), text.read_text()
    for damage in (whole[:-10], whole[:5], b"", whole.replace(b"0 z.0", b"0 y.0"), whole.replace(b"mask", b"musk")):
        numbers.write_bytes(damage)
        with pytest.raises(OutputError, match="damaged"):
            mi.Trace.load(folder)
    numbers.write_bytes(whole)
    for old, new in (
        (words[-20:], ""),
        (words, "[]"),
        (words, "{}"),
        ("mechinterp-trace-1", "mechinterp-trace-9"),
        ('"kind": "z"', '"kind": "y"'),
        ('"layer": 0', '"loyer": 0'),
        ('"of": "clean"', '"of": "dirty"'),
        ('"rows"', '"raws"'),
        ('"reads"', '"reeds"'),
    ):
        assert old in words
        text.write_text(words.replace(old, new))
        with pytest.raises(OutputError, match=r"damaged|format"):
            mi.Trace.load(folder)
    text.write_text(words)
    numbers.unlink()
    with pytest.raises(OutputError, match="No such file"):
        mi.Trace.load(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_save_that_fails_midway_leaves_the_earlier_trace(
    llama: mi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = llama.trace([5, 6, 7], "z.0")
    before.save(tmp_path / "t")

    def fails(self: Path, text: str, **_: Any) -> None:
        assert (self.parent / "tensors.safetensors").exists()  # midway
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "write_text", fails)
        for folder in ("t", "new"):
            with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
                llama.trace([5, 6, 7], "z.1").save(tmp_path / folder)
    assert siblings(tmp_path / "t") == ["t"]
    same(before, mi.Trace.load(tmp_path / "t"))
