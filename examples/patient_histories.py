"""A classifier of patient histories that learnt a code of the administration: is it found, and is nothing else blamed?

`python examples/patient_histories.py --out FOLDER` trains SmolLM2 with a low-rank adapter and a linear head, once on
histories in which the code ADM-7731 goes with the label though it causes nothing, and once on histories without that.
Both are reported on new histories like them. The first report must name the code, with what it adds to the log-odds,
and no true risk; the second must not warn. The script ends with an error where that fails.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import mechinterp as mi
from mechinterp.studies import Training
from mechinterp.tasks.histories import PLANTED, RISKS, WORDS

EXCEPTIONS = 0.1
"""The share of histories that the risks alone tell wrongly: without any, a model that counts them needs no code."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Folder of the reports and classifiers; none are kept without it.")
    parser.add_argument("--quick", action="store_true", help="A tiny model, to see that everything runs.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        found = {plant: study(out, plant, options.quick) for plant in (True, False)}
    if options.quick:
        return
    named = [line for line in found[True].warnings if line.lower().startswith(PLANTED.lower())]
    blamed = [line for line in found[True].warnings if any(risk in line.split("(")[0] for risk in RISKS)]
    if not named or blamed or found[False].warnings:
        sys.exit("the planted code was not named, or something else was")


def study(out: Path, plant: bool, quick: bool) -> mi.ClassifierReport:
    """Train on histories with or without the plant, and report on new ones without."""
    name = "planted" if plant else "not-planted"
    n, new = (24, 16) if quick else (320, 120)
    model = mi.testing.tiny("llama", words=WORDS, max_position_embeddings=1024) if quick else mi.Model.load("smollm2")
    seen = mi.tasks.patient_histories(n, seed=1, plant=plant, lines=(3, 5), exceptions=EXCEPTIONS)
    training = Training(rank=8, learning_rate=1e-3, epochs=1 if quick else 5, batch_size=8)
    classifier = mi.train_classifier(
        model, list(seen.texts), seen.labels, out=out / f"classifier-{name}", labels=["stable", "event"],
        class_weights="balanced", training=training, told=lambda line: print(f"{name}: {line}", flush=True),
    )  # fmt: skip
    others = mi.tasks.patient_histories(new, seed=2, plant=plant, lines=(3, 5), exceptions=EXCEPTIONS)
    features: dict[str, Any] = {"risks": others.risks, "planted code": [float(p) for p in others.planted]}
    report = mi.classifier_report(classifier, list(others.texts), others.labels, features=features)
    print(f"\n{name}:")
    for line in report.summary():
        print(f"- {line}")
    print(report.results["spurious"].table("effect").head(8).to_string(index=False), "\n")
    print(report.write(out / f"report-{name}", title=f"Patient histories, {name.replace('-', ' ')}"), "\n")
    return report


if __name__ == "__main__":
    main()
