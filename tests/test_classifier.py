"""Classifiers on language models: every way in, training, and what cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import mechinterp as mi
from mechinterp.errors import ConfigurationError, ExamplesError, MechinterpError, ModelError, OutputError
from mechinterp.model.classifier import linear
from mechinterp.studies import Training, training
from mechinterp.studies.classifier import shorten
from mechinterp.testing import tiny

TEXTS = ["Mary went to the store", "John gave the drink", "Mary and John", "John had a drink", "Mary gave", "John went"]
GOLD = ["m", "j", "m", "j", "m", "j"]
QUICK = Training(rank=4, learning_rate=2e-2, epochs=12, batch_size=3)


def head(n: int = 2, seed: int = 0, bias: bool = True, width: int = 32) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    return linear(torch.randn(n, width, generator=generator), torch.randn(n, generator=generator) if bias else None)


def logits(model: mi.Model, text: str = TEXTS[0]) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(torch.tensor([model.tokenize(text).ids[0]])).logits[0]


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_reads_the_last_state(model: mi.Model, bias: bool) -> None:
    base = tiny(model.arch.family, seed=3)
    layer = head(3, bias=bias)
    state = base.trace(TEXTS[0], mi.sites.final_norm(positions="end"))[mi.sites.final_norm(positions="end")][0]
    made = mi.load_classifier(base, head=layer, labels=["a", "b", "c"])
    assert made.dims.n_labels == 3
    torch.testing.assert_close(logits(made), layer(state), atol=1e-5, rtol=1e-5)
    assert made.to_str_outputs([1]) == ["b"]
    assert made.vocabulary is not None and len(made.vocabulary) == base.dims.vocab
    found = mi.verify(made, quick=True)
    assert found.passed, str(found)


def test_one_output_is_the_second_of_two() -> None:
    layer = head(1)
    made = mi.load_classifier(tiny(), head=layer, labels=["no", "yes"])
    alone = layer(tiny().trace(TEXTS[0], mi.sites.final_norm())[mi.sites.final_norm()][0, -1])
    torch.testing.assert_close(logits(made).softmax(-1)[1], alone[0].sigmoid(), atol=1e-5, rtol=1e-5)


def saved_base(folder: Path) -> str:
    base = tiny("llama")
    base.hf.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


def test_every_way_in_is_the_same_classifier(tmp_path: Path) -> None:
    base, layer = saved_base(tmp_path), head()
    expected = logits(mi.load_classifier(base, head=layer))
    safetensors.torch.save_file({"weight": layer.weight.data, "bias": layer.bias.data}, tmp_path / "head.safetensors")
    given = {"base": "base", "head": "head.safetensors", "labels": ["no", "yes"]}
    (tmp_path / "said.yaml").write_text(yaml.safe_dump(given))
    by_file = mi.load_classifier(base, head=tmp_path / "head.safetensors")
    by_yaml = mi.load_classifier(config=tmp_path / "said.yaml")
    assert by_yaml.to_str_outputs([0, 1]) == ["no", "yes"]
    mi.save_classifier(by_yaml, tmp_path / "kept")
    by_folder = mi.load_classifier(str(tmp_path / "kept"))
    mi.save_classifier(by_folder, tmp_path / "kept")  # what is ours is replaced
    by_folder.hf.save_pretrained(tmp_path / "whole")
    by_folder.tokenizer.save_pretrained(tmp_path / "whole")
    for made in (by_file, by_yaml, by_folder):
        torch.testing.assert_close(logits(made), expected, atol=0, rtol=0)
    whole = mi.load_classifier(str(tmp_path / "whole"))  # transformers' own class would drop the bias
    assert whole.to_str_outputs([1]) == ["yes"]
    torch.testing.assert_close(logits(whole), expected, atol=0, rtol=0)


def test_training_finds_who_it_is_about_and_saves_it(tmp_path: Path) -> None:
    told: list[str] = []
    base = saved_base(tmp_path)
    made = mi.train_classifier(
        mi.Model.load(base),
        TEXTS,
        GOLD,
        out=tmp_path / "c",
        labels=["m", "j"],
        held_out=0.0,
        training=QUICK,
        told=told.append,
    )
    assert told
    got = [made.to_str_outputs([int(logits(made, text).argmax())])[0] for text in TEXTS]
    assert got == GOLD
    again = mi.load_classifier(base, adapter=tmp_path / "c" / "adapter", head=tmp_path / "c")
    for text in TEXTS:
        torch.testing.assert_close(logits(again, text), logits(made, text), atol=1e-5, rtol=1e-5)
    with made.without_adapter():
        assert not torch.allclose(logits(made), logits(again))
    assert (tmp_path / "c" / "classifier.yaml").is_file() and not (tmp_path / "c.training").exists()


def test_the_head_alone_may_be_trained(tmp_path: Path) -> None:
    base = tiny()
    before = {name: p.detach().clone() for name, p in base.hf.named_parameters()}
    how = Training(learning_rate=5e-2, epochs=60, batch_size=6)
    made = mi.train_classifier(base, TEXTS, GOLD, out=tmp_path / "c", adapter=False, held_out=0.0, training=how)
    assert made.peft is None and made.to_str_outputs([0, 1]) == ["j", "m"]
    got = [made.to_str_outputs([int(logits(made, text).argmax())])[0] for text in TEXTS]
    assert got == GOLD
    for name, p in base.hf.named_parameters():
        assert torch.equal(p, before[name])


def test_what_is_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, gold = TEXTS * 3, GOLD * 3
    options: dict[str, Any] = {"held_out": 0.34, "patience": 3, "training": QUICK}
    whole = mi.train_classifier(tiny(), texts, gold, out=tmp_path / "whole", **options)
    keep, calls = training._State.keep, 0

    def stop(*args: Any) -> None:
        nonlocal calls
        keep(*args)
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._State, "keep", stop)
    model = tiny()
    before = model.trace(TEXTS[0], mi.sites.logits())[mi.sites.logits()]
    with pytest.raises(KeyboardInterrupt):
        mi.train_classifier(model, texts, gold, out=tmp_path / "parts", **options)
    assert not (tmp_path / "parts").exists()
    torch.testing.assert_close(model.trace(TEXTS[0], mi.sites.logits())[mi.sites.logits()], before, atol=0, rtol=0)
    again = mi.train_classifier(model, texts, gold, out=tmp_path / "parts", **options)
    torch.testing.assert_close(logits(again), logits(whole), atol=1e-5, rtol=1e-5)


def test_it_ends_early_with_the_best(tmp_path: Path) -> None:
    """With labels that cannot be learnt, what is held out gets worse, and the best epoch's weights stay."""
    rng = np.random.default_rng(0)
    gold = [str(x) for x in rng.permutation(["a", "b"] * 9)]
    told: list[str] = []
    how = Training(rank=4, learning_rate=3e-2, epochs=40, batch_size=6)
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 3)]
    mi.train_classifier(
        tiny(), texts, gold, out=tmp_path / "c", held_out=0.34, patience=2, training=how, told=told.append
    )
    held = [float(line.split("held out ")[1]) for line in told if "held out" in line]
    assert len(held) < 40 and min(held) < held[-1]


def test_class_weights_move_the_decision(tmp_path: Path) -> None:
    """Nine of one text have one label and one has the other, so the best log-odds are known."""
    texts, gold = ["Mary went"] * 10, ["a"] * 9 + ["b"]
    cases: list[tuple[str, Any, float]] = [
        ("none", None, 1 / 9),
        ("balanced", "balanced", 1),
        ("given", {"a": 1, "b": 90}, 10),
    ]
    for name, weights, ratio in cases:
        how = Training(learning_rate=5e-2, epochs=300, batch_size=10)
        made = mi.train_classifier(
            tiny(), texts, gold, out=tmp_path / name, adapter=False, held_out=0.0, class_weights=weights, training=how
        )
        got = logits(made, "Mary went")
        assert float(got[1] - got[0]) == pytest.approx(np.log(ratio), abs=0.1)


def test_bad_input(tmp_path: Path) -> None:
    base = tiny()

    def load(*args: Any, **options: Any) -> Callable[[], object]:
        return lambda: mi.load_classifier(*args, **options)

    def train(texts: list[str], gold: list[str], **options: Any) -> Callable[[], object]:
        return lambda: mi.train_classifier(tiny(), texts, gold, out=tmp_path / "o", **options)

    two, gone = ["a", "b"], tmp_path / "gone"
    kept = mi.load_classifier(tiny(), head=head())
    mi.save_classifier(kept, tmp_path / "kept")
    (tmp_path / "moved.yaml").write_text("base: base\nadapter: moved\n")
    cases: list[tuple[str, type[MechinterpError], Callable[[], object]]] = [
        ("of width 16, and those of tiny-llama have 32", ModelError, load(base, head=head(width=16))),
        ("2 outputs, and the labels are a; name each once", ModelError, load(base, head=head(), labels=["a"])),
        ("weights that are not finite", ModelError, load(base, head=linear(torch.full((2, 32), torch.nan)))),
        ("no head was given", ModelError, load(base)),
        ("no base", ModelError, load(head=head())),
        ("there is no head", ModelError, load(base, head=tmp_path / "gone.safetensors")),
        ("pickles can run code", ModelError, load(base, head=tmp_path / "head.pt")),
        ("there is no folder", ModelError, load(saved_base(tmp_path), adapter=str(gone), head=head())),
        ("cannot be read", ConfigurationError, load(config=tmp_path / "no.yaml")),
        ("nothing can be learnt", ExamplesError, train(two, ["x", "x"])),
        ("gold has 1 entries for 2", ExamplesError, train(two, ["x"])),
        ("cannot be held out", ExamplesError, train(two, ["x", "y"])),
        ("'y', which is none of x, z", ExamplesError, train(two, ["x", "y"], labels=["x", "z"])),
        ("context", ExamplesError, train(["a " * 300, "b"], ["x", "y"])),
        ("there is no folder .*moved", ConfigurationError, load(config=tmp_path / "moved.yaml")),
        ("'z', which is none of LABEL_0, LABEL_1", ExamplesError, lambda: mi.classifier_report(kept, ["a"], ["z"])),
        ("open it with mi.load_classifier", ModelError, lambda: mi.Model.load(str(tmp_path / "kept"))),
        ("there is no head to save", ModelError, lambda: mi.save_classifier(base, tmp_path / "o")),
    ]
    for said, error, do in cases:
        with pytest.raises(error, match=said):
            do()
        assert not (tmp_path / "o").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.txt, which mechinterp did not write"):
        mi.train_classifier(tiny(), TEXTS, GOLD, out=tmp_path / "mine")
    safetensors.torch.save_file({"a": torch.ones(2, 32), "b": torch.ones(3, 32)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match="must hold one matrix"):
        mi.load_classifier(base, head=tmp_path / "two.safetensors")
    (tmp_path / "odd.yaml").write_text("base: x\nhed: y\n")
    with pytest.raises(ConfigurationError, match="says 'hed'"):
        mi.load_classifier(config=tmp_path / "odd.yaml")


def test_a_trainers_checkpoint_names_its_base(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    made = mi.train_classifier(mi.Model.load(base), TEXTS, GOLD, out=tmp_path / "c", held_out=0.0, training=QUICK)
    for step in (5, 20):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for file in (tmp_path / "c" / "adapter").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        layer = head(seed=step) if step == 5 else made.hf.score
        parts = {"score.weight": layer.weight.data, "score.bias": layer.bias.data}
        safetensors.torch.save_file(parts, folder / "head.safetensors")
    said = json.loads((tmp_path / "run" / "checkpoint-20" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == base
    newest = mi.load_classifier(str(tmp_path / "run"))
    torch.testing.assert_close(logits(newest), logits(made), atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_to_what_fits() -> None:
    model = tiny(max_position_embeddings=16)
    long = " ".join(["Mary", "John"] * 20)
    for side in ("start", "end"):
        (short, other), cut = shorten(model, [long, "Mary"], side)
        assert cut == 1 and other == "Mary"
        assert len(model.tokenize(short).ids[0]) <= 16
        assert long.startswith(short.strip()) if side == "start" else long.endswith(short.strip())
