"""Every Python block of README and docs runs, in order, in one namespace a file."""

import linecache
import re
from pathlib import Path
from unittest.mock import patch

import pytest

import mechinterp as mi
from mechinterp.engine.plan import compile_round
from mechinterp.model.architecture import FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> str:
    """The page's Python blocks, at their own line numbers."""
    text, out = page.read_text(encoding="utf-8"), []
    inside = False
    for line in text.splitlines():
        fence = re.match(r"```(\w*)", line)
        inside = (fence[1] == "python") if fence else inside
        out.append(line if inside and not fence else "")
    return "\n".join(out)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p).strip()], ids=lambda p: p.name)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda self: None)
    source, name = blocks(page), f"<{page.name}>"
    linecache.cache[name] = len(source), None, source.splitlines(True), name  # nnsight reads the source of its blocks
    with patch.dict(FAMILIES):  # a page may add a family
        exec(compile(source, name, "exec"), {"__name__": "page"})


def test_the_six_exercises_compile(smollm2: mi.Model) -> None:
    """Each of them is merged and priced by the engine, on the real model."""
    names: dict[str, object] = {}
    exec(compile(blocks(ROOT / "docs/design.md"), "design.md", "exec"), names)
    edits = ((mi.Edit((1,)), mi.Edit((2,), (5,))), (mi.Edit((0,)),))
    needs = {
        "activation patching": names["activation_patching"],
        "causal tracing 1": names["sigma_first"],
        "causal tracing 2": names["then_trace"](0.1),  # pyright: ignore[reportCallIssue] -- from the page
        "attention by category": names["attention_by_category"],
        "probe": names["probe"],
        "spurious 1": names["statistics_first"],
        "spurious 2": names["then_test"](edits),  # pyright: ignore[reportCallIssue] -- from the page
        "edge attribution": names["edge_attribution"],
    }

    class Exercise(mi.Analyzer):
        def __init__(self, needs: mi.Needs) -> None:
            object.__setattr__(self, "given", needs)

        def needs(self, model: mi.Model) -> mi.Needs:
            return self.given  # pyright: ignore[reportAttributeAccessIssue] -- set above

    work = compile_round(smollm2, [Exercise(n) for n in needs.values()])  # pyright: ignore[reportArgumentType] -- from the page
    assert len(work.sweeps) == 1 + 30 + 1
    assert len(work.grads) == 1
    texts = ["Mary met John and", "Tom met Anna and"]
    pairs = mi.Examples.pairs(texts, texts, answers=[(" John", " Mary")] * 2, spans={"subject": [(0, 4), (0, 3)]})
    pairs = pairs.categorize(mi.Vocabulary.of({"name": ["Mary", "Tom", "John", "Anna"]}))
    for name in ("attention by category", "probe", "edge attribution", "spurious 1", "spurious 2", "causal tracing 1"):
        seen: list[mi.Batch] = []

        class Run(Exercise):
            def observe(self, batch: mi.Batch) -> mi.Part:
                seen.append(batch)  # noqa: B023 -- used within this turn of the loop
                import torch

                return mi.Part(torch.tensor(batch.examples.rows), "example")

        mi.run(smollm2, pairs, Run(needs[name]))  # pyright: ignore[reportArgumentType] -- from the page
        assert len(seen) == 1, name
        if name == "attention by category":
            assert seen[0].clean.stack("pattern").shape == (30, 2, 9, 1)
        if name == "spurious 2":
            assert seen[0].sweeps["without"].values.shape == (2, 2)
        if name == "edge attribution":
            assert seen[0].grads["at receivers"].stack("k").shape == (30, 2, 4, 3, 64)
