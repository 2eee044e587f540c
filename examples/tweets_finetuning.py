"""What fine-tuning changes on real data: 4,200 tweets whose sentiment people have rated.

    python examples/tweets_finetuning.py [--quick] [--out FOLDER]

1. The tweets come with the source archive of the package vaderSentiment (Hutto & Gilbert 2014; twenty people rated each
   from -4 to 4), which pip downloads. They are not part of this repository.
2. SmolLM2 classifies 300 of them zero-shot; then a LoRA adapter is trained on 600 others, and the same 300 are
   classified again.
3. Ten are explained before and after, by Shapley values of their words from 100 masked inputs each. Which words did
   fine-tuning teach the model to heed?
"""

import argparse
import csv
import html
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import mechinterp as mi
from mechinterp.studies import Labelled, Training, compare_finetuned, finetune
from mechinterp.studies.finetuned_report import findings, write_comparison

PACKAGE = "vaderSentiment==3.3.2"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
TWEETS = "hutto_ICWSM_2014/tweets_GroundTruth.txt"
LABELS = ("negative", "positive")
TEMPLATE = "Tweet: {text}\nIs its sentiment negative or positive? It is"


def tweets() -> Labelled:
    """Every tweet that is not rated as neutral in the mean, and the sign of its rating."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE]
        subprocess.run([*command, "--dest", folder], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as outer:
            inner = outer.extractfile(next(name for name in outer.getnames() if name.endswith(INNER)))
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as resources:
                file = resources.extractfile(TWEETS)
                assert file is not None
                table = file.read().decode("ascii", "replace")
    rows = [(float(row[1]), html.unescape(row[2])) for row in csv.reader(io.StringIO(table), "excel-tab", quoting=3)]
    seen = dict.fromkeys(text for _, text in rows)
    rated = {text: rating for rating, text in rows if rating}
    texts = tuple(text for text in seen if text in rated)
    return Labelled(texts, tuple(LABELS[rated[text] > 0] for text in texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few tweets: that it runs, not what it finds")
    parser.add_argument("--out", type=Path, help="a folder for the study; nothing is written without it")
    options = parser.parse_args()
    n_train, n_eval, n_explained, evaluations = (16, 16, 2, 20) if options.quick else (600, 300, 10, 100)
    began = time.perf_counter()
    print("1. Tweets")
    every = tweets()
    evaluated = every.part(n_eval, seed=0)
    trained_on = every.part(n_train, seed=1, without=evaluated)
    share = every.labels.count("positive") / len(every)
    print(f"   {len(every):,} are rated, {share:.0%} of them positive; {n_train} to train, {n_eval} to evaluate")
    model = mi.Model.load("smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        print("2. Training")
        trained = finetune(
            model, list(trained_on.texts), LABELS, TEMPLATE, gold=trained_on.labels, out=adapter,
            training=Training(learning_rate=5e-4), told=lambda line: print(f"   {line}", flush=True),
        )  # fmt: skip
        print("3. Before and after")
        found = compare_finetuned(
            trained, list(evaluated.texts), LABELS, TEMPLATE, gold=evaluated.labels, explain=n_explained,
            evaluations=evaluations, told=lambda line: print(f"   {line}", flush=True),
        )  # fmt: skip
        for line in findings(found):
            print(f"   {line}")
        for name, result in found.explanations.items():
            data = result.data
            order = sorted(range(data.sizes["term"]), key=lambda i: -float(data["mean_size"][i]))[:8]
            words = ", ".join(f"{data['term'].values[i]} {float(data['mean_attribution'][i]):+.2f}" for i in order)
            print(f"   {name.replace('_', '-')}, words that count most for positive: {words}")
        if options.out is not None:
            title = "Tweets: what fine-tuning SmolLM2 changed"
            print(f"   report: {write_comparison(found, trained, options.out, title=title, adapter=adapter)}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
