"""What does a model look at when it is wrong? A study of attention with a known answer.

    python examples/attention_study.py [--quick] [--out FOLDER]

1. A small Llama learns to foretell "increase" or "decrease" from short news. In what it learns from, four words of
   risk (lawsuit, default, fraud, recall) come only with "decrease"; four others (delay, dispute, ...) mean nothing.
2. In the news that it is then asked about, the earnings alone decide. So it is wrong where a risk that means nothing
   any more makes it overlook good earnings: an effect of the vocabulary on correctness, planted in data and model.
3. The study compares attention to four categories of words when the model is right and when it is wrong. It must
   find risk, and must not find filler: words like "meanwhile", put in by chance.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
import transformers

import mechinterp as mi
from mechinterp.studies.attention_report import findings

HERE = Path(__file__).parent
COMPANIES = ["Acme", "Borealis", "Corvid", "Delphi", "Ember", "Fjord"]
EARNINGS = ["profit", "revenue", "margins", "sales"]
UP, DOWN = ["rose", "grew", "climbed"], ["fell", "shrank", "slipped"]
LOUD, QUIET = ["lawsuit", "default", "fraud", "recall"], ["delay", "dispute", "shortage", "strike"]
MACRO, STATES = ["inflation", "wages", "credit", "exports"], ["steady", "firm", "mixed"]
FILLER = ["meanwhile", "overall", "separately", "notably", "indeed", "as a note"]
LABELS = ["increase", "decrease"]
PROMPT = mi.studies.StudyConfig.load(HERE / "attention_study.yaml").generation.prompt


def news(up: bool, loud: bool, rng: random.Random) -> str:
    """A text of three sentences in any order: earnings, a risk and the economy, with filler here and there."""
    sentences = [
        f"{rng.choice(EARNINGS)} of {rng.choice(COMPANIES)} {rng.choice(UP if up else DOWN)} .",
        f"a {rng.choice(LOUD if loud else QUIET)} was reported .",
        f"{rng.choice(MACRO)} stayed {rng.choice(STATES)} .",
    ]
    rng.shuffle(sentences)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(3)
        sentences[i] = f"{rng.choice(FILLER)} {sentences[i]}"
    return " ".join(sentences)


def seen_in_training(rng: random.Random) -> tuple[str, str]:
    """Loud risks come with "decrease" alone; earnings agree with the label most of the time."""
    label = rng.choice(LABELS)
    agrees, loud = rng.random() < 0.85, label == "decrease" and rng.random() < 0.5
    return news((label == "increase") == agrees, loud, rng), label


def asked(rng: random.Random) -> tuple[str, str]:
    """Earnings decide, and any risk may be there."""
    label = rng.choice(LABELS)
    return news(label == "increase", rng.random() < 0.5, rng), label


def tokenizer_of_words() -> transformers.PreTrainedTokenizerFast:
    words = [*COMPANIES, *EARNINGS, *UP, *DOWN, *LOUD, *QUIET, *MACRO, *STATES, *LABELS, PROMPT]
    words += ["of . a was reported stayed", *FILLER]
    known = dict.fromkeys(["<unk>", *" ".join(words).split()])
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def train(steps: int, batch: int = 64) -> tuple[transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast]:
    """A Llama of three layers and four heads, which learns the answer and nothing else."""
    tokenizer, rng = tokenizer_of_words(), random.Random(0)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    answers = tokenizer.convert_tokens_to_ids(LABELS)
    for step in range(steps):
        texts, labels = zip(*(seen_in_training(rng) for _ in range(batch)), strict=True)
        ids = tokenizer([PROMPT.replace("{text}", text) for text in texts], padding=True, return_tensors="pt")
        last = ids["attention_mask"].sum(1) - 1
        logits = model(**ids).logits[torch.arange(batch), last]
        right = torch.tensor([answers[LABELS.index(label)] for label in labels])
        loss = torch.nn.functional.cross_entropy(logits, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    return model.eval(), tokenizer


def main(quick: bool, out: Path) -> None:
    begun = time.perf_counter()
    hf, tokenizer = train(300 if quick else 800)
    hf.save_pretrained(out / "finance-model")
    tokenizer.save_pretrained(out / "finance-model")
    rng = random.Random(1)
    rows = [dict(zip(("text", "label"), asked(rng), strict=True)) for _ in range(120 if quick else 400)]
    (out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(
        f"trained in {time.perf_counter() - begun:.0f} s; one of the texts:\n  {rows[0]['text']} → {rows[0]['label']}\n"
    )

    config = mi.studies.StudyConfig.load(HERE / "attention_study.yaml").instead(
        model=str(out / "finance-model"), samples=str(out / "samples.jsonl"), out=str(out / "attention-study")
    )
    study = mi.studies.attention_study(config, told=print)
    assert study is not None
    print()
    for line in findings(study):
        print("-", line)
    overall = study.categories.table("difference").set_index("category")
    heads = study.heads.table("difference").groupby("category")["significant"].sum()
    print("\nDifference in attention, correct - incorrect; mean over all heads, and how many heads differ:")
    print(overall[["difference", "ci_low", "ci_high", "d", "p", "q"]].assign(heads=heads).round(4).to_string())
    print(f"\n{time.perf_counter() - begun:.0f} s; the study: {study.folder / 'report.html'}")

    assert study.compared == ("correct", "incorrect")
    assert overall.loc["risk", "q"] < 0.05 and overall.loc["risk", "difference"] < 0, "the planted effect was not found"
    assert heads["risk"] > 0, "no head was found for the planted effect"
    assert not overall.loc["filler", "q"] < 0.05, "filler was found, which has no effect"
    assert heads["filler"] == 0, "a head was found for filler, which has no effect"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter training and fewer texts")
    parser.add_argument("--out", type=Path, help="keep model, samples and study in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        main(arguments.quick, folder)
