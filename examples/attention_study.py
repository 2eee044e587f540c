"""What does a model look at when it is wrong? A study of attention with a known answer.

    python examples/attention_study.py [--quick] [--out FOLDER]

1. A small Llama learns to foretell "increase" or "decrease" from short news. One word tells: of risk (a lawsuit, an
   approval ...) or of the economy (a recession, a stimulus ...). Both kinds tell alike, so the model treats them alike.
2. In the news that it is then asked about, words of risk tell nothing any more. So it is wrong where it goes by one:
   an effect of the vocabulary on correctness, planted in the data and in the model.
3. The study compares attention to categories of words when the model is right and when it is wrong. It must find
   risk, and it must not find filler: words like "meanwhile", put in by chance.

Why two kinds of words that tell: shares of attention sum to one. Were there a telling word only in the texts that go
wrong, it would take attention from everything else, filler too, and filler would be no null. (A true null is found
with one seed in twenty: that is what p < .05 means.)
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
MOVES = {"increase": ["rose", "grew", "climbed"], "decrease": ["fell", "shrank", "slipped"]}
RISK = {"increase": ["settlement", "approval", "clearance"], "decrease": ["lawsuit", "fraud", "recall"]}
MACRO = {"increase": ["stimulus", "recovery", "expansion"], "decrease": ["recession", "tariff", "inflation"]}
QUIET = {"risk": ["audit", "review", "filing"], "macro": ["wages", "credit", "exports"]}
TWINS = dict(zip(sum(RISK.values(), QUIET["risk"]), sum(MACRO.values(), QUIET["macro"]), strict=True))
TWINS |= {macro: risk for risk, macro in TWINS.items()}
FILLER = ["meanwhile", "overall", "separately", "notably", "indeed", "as a note"]
LABELS = ["increase", "decrease"]
PROMPT = mi.studies.StudyConfig.load(HERE / "attention_study.yaml").generation.prompt


def news(tells: str, direction: str, earnings: str, rng: random.Random) -> str:
    """A text of three sentences in any order: earnings, risk and the economy, with filler here and there.

    One word tells the direction, of risk or of the economy (`tells`); in the other's sentence stands one that does not.
    """
    risk = rng.choice(RISK[direction] if tells == "risk" else QUIET["risk"])
    macro = rng.choice(MACRO[direction] if tells == "macro" else QUIET["macro"])
    sentences = [
        f"{rng.choice(EARNINGS)} of {rng.choice(COMPANIES)} {rng.choice(MOVES[earnings])} .",
        f"there was news of {risk} .",
        f"there was news of {macro} .",
    ]
    rng.shuffle(sentences)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(3)
        sentences[i] = f"{rng.choice(FILLER)} {sentences[i]}"
    return " ".join(sentences)


def seen_in_training(rng: random.Random) -> tuple[str, str]:
    """The word that tells is always right; earnings are right a little more often than not."""
    label = rng.choice(LABELS)
    earnings = label if rng.random() < 0.65 else rng.choice(LABELS)
    return news(rng.choice(["risk", "macro"]), label, earnings, rng), label


def twin(text: str) -> str:
    """The same text with words of risk and of the economy exchanged."""
    return " ".join(TWINS.get(word, word) for word in text.split())


def asked(rng: random.Random) -> tuple[str, str]:
    """A word of the economy is right; one of risk may be so or not, and so may earnings."""
    tells, direction = rng.choice(["risk", "macro"]), rng.choice(LABELS)
    label = direction if tells == "macro" else rng.choice(LABELS)
    return news(tells, direction, rng.choice(LABELS), rng), label


def tokenizer_of_words() -> transformers.PreTrainedTokenizerFast:
    words = [*COMPANIES, *EARNINGS, *MOVES["increase"], *MOVES["decrease"], *TWINS, *LABELS, *FILLER]
    words += [PROMPT, "there was news of ."]
    known = dict.fromkeys(["<unk>", *" ".join(words).split()])
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def train(steps: int, batch: int = 32) -> tuple[transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast]:
    """A Llama of three layers and four heads, which learns the answer and nothing else."""
    tokenizer, rng = tokenizer_of_words(), random.Random(0)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    # A word and its twin begin as one, and every text comes with its twin: so they stay one to the model.
    embedding = model.get_input_embeddings().weight.data
    for word, other in TWINS.items():
        embedding[tokenizer.convert_tokens_to_ids(word)] = embedding[tokenizer.convert_tokens_to_ids(other)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    answers = tokenizer.convert_tokens_to_ids(LABELS)
    for step in range(steps):
        texts, labels = zip(*(seen_in_training(rng) for _ in range(batch)), strict=True)
        texts, labels = (*texts, *map(twin, texts)), 2 * labels
        ids = tokenizer([PROMPT.replace("{text}", text) for text in texts], padding=True, return_tensors="pt")
        last = ids["attention_mask"].sum(1) - 1
        logits = model(**ids).logits[torch.arange(len(texts)), last]
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
    rng = random.Random(2)
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
    heads = study.heads.data
    shown = overall[["difference", "ci_low", "ci_high", "d", "q"]].assign(
        q_of_any_head=heads["category_q"].values, heads=heads["significant"].sum(("layer", "head")).values
    )
    print("\nAttention, correct - incorrect: mean over all heads; whether any head differs, and how many:")
    print(shown.round(4).to_string())
    print(f"\n{time.perf_counter() - begun:.0f} s; the study: {study.folder / 'report.html'}")

    assert study.compared == ("correct", "incorrect")
    risk, filler = shown.loc["risk"], shown.loc["filler"]
    assert max(risk["q"], risk["q_of_any_head"]) < 0.05 and risk["difference"] < 0, "the planted effect was not found"
    assert risk["heads"] > 0, "no head was found for the planted effect"
    assert min(filler["q"], filler["q_of_any_head"]) >= 0.05, "filler was found, which has no effect"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter training and fewer texts")
    parser.add_argument("--out", type=Path, help="keep model, samples and study in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        main(arguments.quick, folder)
