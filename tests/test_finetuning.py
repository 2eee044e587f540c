"""Fine-tuning of an adapter: only the label is learnt, what is interrupted goes on, and the base stays as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ConfigurationError, ExamplesError, ModelError, OutputError
from mechinterp.studies import finetuning, training
from mechinterp.studies.finetuning import finetune, padded
from mechinterp.studies.training import Training
from mechinterp.testing import tiny

MARY = ["the man gave a book to Mary", "a man and Mary", "Mary gave the book", "the book to Mary", "Mary and a man"]
JOHN = [text.replace("Mary", "John") for text in MARY]
TEXTS, GOLD = [*MARY, *JOHN], ["m"] * 5 + ["j"] * 5
WORDS = {"m": "Mary", "j": "John"}
TEMPLATE = "{text} and"
QUICK = Training(rank=4, learning_rate=0.02, epochs=12, batch_size=5)


def logits(model: mi.Model) -> torch.Tensor:
    return model.trace(TEXTS[0], "logits")["logits"]


def test_it_learns_and_the_base_stays_as_it_was(tmp_path: Path) -> None:
    model = tiny()
    before = logits(model)
    base = mi.classify(model, TEXTS, WORDS, TEMPLATE, gold=GOLD).data
    told: list[str] = []
    trained = finetune(
        model, TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "adapter", training=QUICK, told=told.append
    )
    after = mi.classify(trained, TEXTS, WORDS, TEMPLATE, gold=GOLD).data
    assert float(after["value"].sel(metric="log_loss")) < 0.5 * float(base["value"].sel(metric="log_loss"))
    assert float(after["value"].sel(metric="accuracy")) == 1.0
    with trained.without_adapter():
        torch.testing.assert_close(logits(trained), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in trained.hf.parameters())
    assert told[-1].startswith("step 24 of 24, loss ")
    about = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert len(about["loss"]) == 24 and about["loss"][-1] < about["loss"][0]
    assert sorted(about["files"]) == sorted(p.name for p in (tmp_path / "adapter").iterdir())
    assert not (tmp_path / "adapter.training").exists()


def test_the_saved_adapter_is_the_trained_one(tmp_path: Path) -> None:
    base = tiny()
    base.hf.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    model = mi.Model.load(tmp_path / "base")
    trained = finetune(model, TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "adapter", training=QUICK)
    again = mi.Model.load(tmp_path / "base", adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(trained), rtol=0, atol=1e-6)


def test_only_the_labels_have_a_loss() -> None:
    ids, mask, targets = padded([((1, 2, 3), (4,)), ((5,), (6, 7))], 0, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3, 4], [0, 5, 6, 7]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert targets.tolist() == [[-100, -100, -100, 4], [-100, -100, 6, 7]]


def test_the_loss_is_that_of_hugging_face_with_masked_prompts() -> None:
    model = tiny()
    batch = [((3, 4, 5, 6), (7,)), ((8, 9), (10, 11))]
    ids, mask, targets = padded(batch, 0, torch.device("cpu"))
    expected = model.hf(input_ids=ids, attention_mask=mask, labels=targets).loss
    assert float(finetuning._loss(model, batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_what_is_interrupted_goes_on_to_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 5)
    whole = finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "whole", training=QUICK)
    calls = 0
    loss = finetuning._loss

    def interrupted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyboardInterrupt
        return loss(*args)

    model = tiny()
    before = logits(model)
    monkeypatch.setattr(finetuning, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "parts", training=QUICK)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.hf.parameters())
    told: list[str] = []
    resumed = finetune(
        model, TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "parts", training=QUICK, told=told.append
    )
    assert told[0] == "going on after step 12 of 24"
    torch.testing.assert_close(logits(resumed), logits(whole), rtol=0, atol=1e-6)
    losses = [json.loads((tmp_path / name / "training.json").read_text())["loss"] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    calls = 100
    monkeypatch.setattr(finetuning, "_loss", None)  # what is finished is not trained again
    again = finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "parts", training=QUICK)
    torch.testing.assert_close(logits(again), logits(whole), rtol=0, atol=1e-6)


def test_the_beginning_of_another_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 1)
    keep = training._State.keep

    def stop(*args: Any) -> None:
        keep(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(training._State, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "a", training=QUICK)
    with pytest.raises(OutputError, match="another training; delete it"):
        finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "a", training=Training(rank=2))
    (tmp_path / "a.training" / "training.safetensors").write_bytes(b"cut")
    with pytest.raises(OutputError, match="cannot be read"):
        finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "a", training=QUICK)


def test_bad_input(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(ExamplesError, match="every text has the label 'm', so there is nothing to learn"):
        finetune(tiny(), MARY, WORDS, TEMPLATE, gold=["m"] * 5, out=out)
    with pytest.raises(ExamplesError, match="gold has 0 entries for 5 texts"):
        finetune(tiny(), MARY, WORDS, TEMPLATE, out=out)
    with pytest.raises(ExamplesError, match="'k', which is none of m, j"):
        finetune(tiny(), MARY, WORDS, TEMPLATE, gold=["m", "k", "m", "j", "j"], out=out)
    with pytest.raises(ModelError, match="is a classifier"):
        finetune(tiny(num_labels=2), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=out)
    with pytest.raises(ModelError, match="cannot be given an adapter"):
        finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=out, training=Training(targets=("nowhere",)))
    with pytest.raises(ExamplesError, match="more than the model's context of 256"):
        finetune(tiny(), [*TEXTS, "the " * 300], WORDS, TEMPLATE, gold=[*GOLD, "m"], out=out)
    with pytest.raises(ConfigurationError, match="rank of Training must be above 0"):
        Training(rank=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="which mechinterp did not write"):
        finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=tmp_path / "mine")
    trained = finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=out, training=Training(epochs=1))
    with pytest.raises(ModelError, match="has an adapter already"):
        finetune(trained, TEXTS, WORDS, TEMPLATE, gold=GOLD, out=out)
    assert not out.with_name("adapter.training").exists()


def test_4_bit_weights_need_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match="4-bit weights need a CUDA device"):
        mi.Model.load("smollm2", load_in_4bit=True)
