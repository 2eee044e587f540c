"""Do explanations find what was planted? A controlled experiment in which the right answer is known.

    python examples/tfidf_experiment.py [--quick] [--out FOLDER]

1. Eighteen short reviews hold nine words of interest: three praise, three blame, three say nothing. Praise and blame
   make the label; in two of the reviews the label is then turned round, as people do when they label by mistake.
2. Two linear classifiers of TF-IDF learn it. Integrated gradients must equal weight · x there, to 1e-6.
3. SmolLM2 reads the same reviews without any training. Do its explanations name the planted words, and do they agree
   with each other and with the classifiers', whose explanations are exact?
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

import mechinterp as mi
from mechinterp.report.figures import matplotlib_figure
from mechinterp.report.files import write_picture
from mechinterp.studies import attribution_agreement, compare_attributions

PRAISE = ["superb", "charming", "moving"]
BLAME = ["dreadful", "tedious", "clumsy"]
NEUTRAL = ["plot", "cast", "music"]
TERMS = [*PRAISE, *NEUTRAL, *BLAME]
PLANTED = {"positive": PRAISE, "negative": BLAME}
FORMS = [
    "The {n} was {a} and {b}, though the {m} seemed {other}.",
    "We found the {n} {a}, the {m} {b}, and the ending {c}.",
    "Everyone said that the {n} was {a} and the {m} {b}.",
]
TEMPLATE = "Review: {text}\nSentiment:"


def reviews(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Texts, what they say, and their labels, of which two are wrong."""
    rng = random.Random(seed)
    texts, truth = [], []
    for i in range(18):
        label = ("positive", "negative")[i % 2]
        own = rng.sample(PLANTED[label], 3)
        other = rng.choice(PLANTED["negative" if label == "positive" else "positive"])
        n, m = rng.sample(NEUTRAL, 2)
        texts.append(FORMS[i // 2 % 3].format(n=n, m=m, a=own[0], b=own[1], c=own[2], other=other))
        truth.append(label)
    labels = list(truth)
    for i in (rng.randrange(0, 18, 2), rng.randrange(1, 18, 2)):  # one of each label
        labels[i] = "negative" if truth[i] == "positive" else "positive"
    return texts, truth, labels


def planted_words(text: str) -> list[int]:
    """The numbers of the words that praise or blame."""
    return [i for i, word in enumerate(text.split()) if word.strip(".,") in (*PRAISE, *BLAME)]


def on_terms(result: mi.Result) -> xr.DataArray:
    """The attributions of words that are terms, ``example term``; NaN where a review lacks the term."""
    out = np.full((result.data.sizes["example"], len(TERMS)), np.nan)
    for row in result.table("word_attribution").itertuples():
        if (term := row.word.strip(".,").lower()) in TERMS:
            out[row.example, TERMS.index(term)] = row.word_attribution
    return xr.DataArray(out, {"term": TERMS}, ("example", "term"))


def figures(weights: dict[str, mi.Result], results: dict[str, mi.Result], names: list[str], out: Path) -> None:
    """Heatmaps of coefficients and of attributions, as PNG and SVG."""
    models = xr.DataArray(list(weights), dims="model", name="model")
    both = xr.concat([w.data.sel(label="positive", term=TERMS).drop_vars("label") for w in weights.values()], models)
    view = mi.View(
        "heatmap", "weight", "term", "model", title="Weights of the label positive", unit="log-odds or half-margins",
        center=0.0, mark="interval_excludes_zero",
    )  # fmt: skip
    write_picture(matplotlib_figure(mi.Result(both), view), out / "coefficients")
    models = xr.DataArray(list(results), dims="model", name="model")
    each = xr.concat([on_terms(result) for result in results.values()], models).rename(example="review")
    each = (each / np.abs(each).max(("term", "review"))).transpose("model", "term", "review")
    view = mi.View(
        "heatmap", "attribution", "term", "review", by="model", title="Attribution to positive (* label is wrong)",
        unit="share of the model's largest", center=0.0, y_text="label", scale="shared",
    )  # fmt: skip
    numbers = np.arange(1, len(names) + 1)
    whole = xr.Dataset({"attribution": each, "label": ("review", names)}, {"review": numbers})
    write_picture(matplotlib_figure(mi.Result(whole), view), out / "attributions")


def main(quick: bool, out: Path) -> None:
    begun = time.perf_counter()
    texts, truth, labels = reviews(seed=0)
    wrong = [i for i in range(18) if truth[i] != labels[i]]
    print(f"{len(texts)} reviews, of which {wrong[0] + 1} and {wrong[1] + 1} have the wrong label; three of them:")
    print(*(f"  {text} → {label}" for text, label in zip(texts[::7], labels[::7], strict=True)), sep="\n")

    linear = {
        "logistic": mi.tfidf_classifier(texts, labels, "logistic", vocabulary=TERMS),
        "SVM": mi.tfidf_classifier(texts, labels, "svm", vocabulary=TERMS),
    }
    weights = {name: one.coefficients(resamples=100 if quick else 1000) for name, one in linear.items()}
    print("\nWeights of the label positive, with 95% bootstrap intervals:")
    for name, found in weights.items():
        table = found.table().query("label == 'positive'").drop(columns="label")
        print(f"{name}\n{table.round(3).to_string(index=False)}")
        for label, planted in PLANTED.items():
            first = found.data["weight"].sel(label=label).to_series().nlargest(3).index
            print(f"  top three for {label}: {', '.join(first)}; {len({*first} & {*planted})} of 3 planted")

    print("\nIntegrated gradients against weight · x, the largest difference over all reviews and terms:")
    exact: dict[str, mi.Result] = {}
    for name, one in linear.items():
        for baseline in ("zero", "mean"):
            product = one.attribute(texts, "weight-x-input", label="positive", baseline=baseline)
            ig = one.attribute(texts, "integrated-gradients", label="positive", baseline=baseline)
            apart = float(np.abs(ig.data["attribution"] - product.data["attribution"]).max())
            error = float(np.abs(ig.data["completeness_error"]).max())
            print(f"  {name:9} from {baseline}: |IG - w·x| ≤ {apart:.1e}, completeness error ≤ {error:.1e}")
            assert apart < 1e-6 and error < 1e-6
            if baseline == "zero":
                exact |= {f"{name} w·x": product, f"{name} IG": ig}
    for name, one in linear.items():
        right = [a == b for a, b in zip(one.predict(texts), truth, strict=True)]
        mistakes = sum(right[i] for i in wrong)
        print(f"  {name}: right about {sum(right)} of 18 reviews, and about {mistakes} of 2 whose label is wrong")

    model, some = mi.Model.load("smollm2"), 2 if quick else 18
    start = TEMPLATE.index("{text}")
    prompts = mi.Examples.of(
        [TEMPLATE.replace("{text}", text) for text in texts[:some]],
        answers=[(" positive", " negative")] * some,
        spans={"text": [(start, start + len(text)) for text in texts[:some]]},
    )
    # A tolerance of 1 leaves the steps as they are: what does not add up then is printed.
    of, metric = {"positions": "text", "evaluations": 30 if quick else 100}, mi.logit_diff()
    methods = {
        "gradient·x": mi.TokenAttribution("grad-x-input", metric, **of),
        "IG": mi.TokenAttribution("integrated-gradients", metric, **of, steps=20 if quick else 100, tolerance=1.0),
        "SHAP": mi.TokenAttribution("partition-shap", metric, **of),
    }
    found = mi.run(model, prompts, list(methods.values()))
    results = dict(zip([f"SmolLM2 {name}" for name in methods], found, strict=True))
    ig = results["SmolLM2 IG"].data
    score, left = ig["score"].values, np.abs(ig["completeness_error"] / np.abs(ig["attribution"]).sum("position"))
    right = sum((score > 0) == (np.array(truth[:some]) == "positive"))
    print(f"\nSmolLM2, not trained on them, is right about {right} of {some} reviews. Its integrated gradients")
    print(f"add up but for {float(left.mean()):.1%} of their size on average, {float(left.max()):.1%} at most.")

    same = {n: mi.Result(r.data.isel(example=slice(some)), r.meta, r.views) for n, r in exact.items()} | results
    agreement = attribution_agreement(same, planted=[planted_words(text) for text in texts[:some]])
    named = agreement.table("planted_overlap")
    print(
        "\nThe planted words of a review, or three where there are more, that are among each method's top three words:"
    )
    print(named.round(2).to_string(index=False))
    print(f"\nAgreement on the words of the same {some} reviews, with 95% bootstrap intervals:")
    pairs = agreement.table()
    for kind in ("cosine", "spearman", "top_overlap"):
        low, high = pairs[f"{kind}_ci_low"], pairs[f"{kind}_ci_high"]
        pairs[kind] = [f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in zip(pairs[kind], low, high, strict=True)]
    for other in ("logistic IG", "SmolLM2 IG"):
        rows = pairs[(pairs["other"] == other) & (pairs["method"] != other)]
        print(rows[["method", "other", "cosine", "spearman", "top_overlap"]].to_string(index=False))
    two = compare_attributions(results["SmolLM2 IG"], results["SmolLM2 SHAP"])
    print("\nSmolLM2: integrated gradients (first) and SHAP (second)")
    print(two.table().round(3).to_string(index=False), two.table("value").round(3).to_string(index=False), sep="\n")
    names = [f"{i + 1} {label}{'*' if i in wrong else ''}" for i, label in enumerate(labels[:some])]
    figures(weights, {name: same[name] for name in ("logistic IG", "SVM IG", "SmolLM2 IG")}, names, out)
    write_picture(matplotlib_figure(agreement, agreement.views[0]), out / "agreement")
    print(f"\n{time.perf_counter() - begun:.0f} s; figures: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="SmolLM2 explains two reviews, in fewer steps")
    parser.add_argument("--out", type=Path, help="keep the figures in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        main(arguments.quick, folder)
