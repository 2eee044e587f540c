"""A comparison of zero-shot and fine-tuned on disk: metrics, explanations, their statistics, pictures and a page."""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from mechinterp.core.display import count
from mechinterp.core.result import Result
from mechinterp.engine.runner import provenance
from mechinterp.errors import OutputError
from mechinterp.model.model import Model
from mechinterp.report.comparison import metrics_figure, summary_figure
from mechinterp.report.files import plain_json
from mechinterp.report.study import write_study
from mechinterp.studies.finetuned import FINE_TUNED, ZERO_SHOT, FinetunedComparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BADGE = "project_badge.svg"
ADAPTER = "lora_adapter"
LARGEST_BADGE = 1 << 20
TOP = 20
"""Words in a summary of explanations."""
NAMES = {ZERO_SHOT: "zero-shot", FINE_TUNED: "fine-tuned"}


def write_comparison(
    comparison: FinetunedComparison,
    model: Model,
    folder: str | Path,
    *,
    title: str = "What fine-tuning changed",
    adapter: str | Path | None = None,
    badge: str | Path | None = "",
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write everything that was found into a folder, whole or not at all; an earlier comparison there is replaced.

    Files: ``zero_shot_metrics.json``, ``fine_tuned_metrics.json``, ``metrics_comparison.png``; of explanations
    ``zero_shot_shap.json``, ``fine_tuned_shap.json``, the ``…_shap_summary.png`` of both, and
    ``interpretability_metrics.json``; ``predictions.jsonl``; ``project_badge.svg`` and ``project_badge.json``;
    ``lora_adapter/``; and, as of every study, tables, figures, results, ``report.html`` and ``manifest.json``.

    Args:
        adapter: a folder of an adapter to be copied.
        badge: an SVG file to copy beside the outputs; "" for mechinterp's own, None for none.
        manifest: more of what the numbers depend on, plain values.
    Returns:
        The path of the page.
    Raises:
        OutputError: the folder holds something else or cannot be written, or the badge cannot be used.
    """
    files: dict[str, str | bytes] = {}
    for name, result in comparison.scores.items():
        files[f"{name}_metrics.json"] = plain_json(metrics(result))
    pictures: dict[str, Figure] = {"metrics_comparison": metrics_figure(_named(comparison.scores), title)}
    for name, result in comparison.explanations.items():
        files[f"{name}_shap.json"] = plain_json(explained(comparison, name))
        pictures[f"{name}_shap_summary"] = summary_figure(result, f"What words contribute, {NAMES[name]}")
    if comparison.agreement is not None:
        files["interpretability_metrics.json"] = plain_json(statistics(comparison.agreement))
    files |= {f"{name}.png": _png(picture) for name, picture in pictures.items()}
    files["predictions.jsonl"] = predictions(comparison)
    if badge is not None:
        files |= badge_files(badge)
    if adapter is not None:
        files |= {f"{ADAPTER}/{path.name}": path.read_bytes() for path in sorted(Path(adapter).iterdir())}
    results = [
        Result(result.data, {**result.meta, "analyzer": f"{kind} {NAMES[name]}"}, result.views)
        for kind, found in (("Classification", comparison.scores), ("Explanations", comparison.explanations))
        for name, result in found.items()
    ]
    results += [] if comparison.agreement is None else [comparison.agreement]
    about = {
        **provenance(model),
        "texts": len(comparison.texts),
        "labels": dict(comparison.labelling.words),
        "template": comparison.labelling.template,
        **(manifest or {}),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return write_study(folder, title, results, plan="", manifest=about, summary=findings(comparison), files=files)


def findings(comparison: FinetunedComparison) -> list[str]:
    """What was found, in sentences."""
    out = []
    for name in (ZERO_SHOT, FINE_TUNED):
        data: Any = comparison.scores[name].data
        told = {
            m: [float(data[c].sel(metric=m)) for c in ("value", "ci_low", "ci_high")] for m in data["metric"].values
        }
        accuracy, f1 = told["accuracy"], told["macro_f1"]
        out.append(
            f"{NAMES[name].capitalize()}: accuracy {accuracy[0]:.3f} ({accuracy[1]:.3f} to {accuracy[2]:.3f}), macro F1"
            f" {f1[0]:.3f} ({f1[1]:.3f} to {f1[2]:.3f}), mean confidence {told['mean_confidence'][0]:.3f}, calibration"
            f" error {told['calibration_error'][0]:.3f}; always naming the most frequent class gives"
            f" {told['majority_accuracy'][0]:.3f}."
        )
    change = comparison.changes["accuracy"]
    out.append(
        f"Fine-tuning corrected {count(int(change['corrected']), 'prediction')} and spoiled {change['spoiled']:.0f}:"
        f" accuracy {change['mean']:+.3f} ({change['ci_low']:+.3f} to {change['ci_high']:+.3f}), p {change['p']:.2g} by"
        " McNemar's exact test."
    )
    if comparison.agreement is not None:
        out.append(_told_of_agreement(comparison, comparison.agreement))
    return out


def _told_of_agreement(comparison: FinetunedComparison, agreement: Result) -> str:
    said = statistics(agreement)
    errors = [
        float(np.nanmax(np.abs(result.data["additivity_error"].values)))
        for result in comparison.explanations.values()
        if "additivity_error" in result.data
    ]
    more = f" Attributions add up within {max(errors):.1g}." if errors else ""
    agreed = [(name.replace("_", "-"), said["agreement"][name]) for name in ("spearman", "cosine", "top_5")]
    named = ", ".join(f"{name} {one['mean']:.2f} (chance {one['chance']:.2f})" for name, one in agreed)
    size = said["measures"]["mean_size"]
    return (
        f"Explanations of {count(said['n_examples'], 'text')}, word by word: {named} between zero-shot and fine-tuned;"
        f" mean |attribution| {size[ZERO_SHOT]:.3f} and {size[FINE_TUNED]:.3f} (Cohen's d {size['d']:.2f}).{more}"
    )


def statistics(agreement: Result) -> dict[str, Any]:
    """What `compare_attributions` says over all texts, as plain values; the rest of it is in the study's tables."""
    data: Any = agreement.data

    def row(axis: str, name: str, columns: Mapping[str, str]) -> dict[str, Any]:
        return {new: data[old].sel({axis: name}).item() for old, new in columns.items()}

    measured = {"first": FINE_TUNED, "second": ZERO_SHOT, "difference": "difference", "d": "d", "p": "p", "q": "q"}
    measured |= {name: name for name in ("ci_low", "ci_high", "d_ci_low", "d_ci_high")}
    agreed = {"value": "mean", "value_ci_low": "ci_low", "value_ci_high": "ci_high", "chance": "chance"}
    agreed |= {"examples": "n"}
    return {
        "n_examples": int(data.sizes["example"]),
        "difference_is": "fine-tuned minus zero-shot, paired over examples",
        "measures": {str(name): row("measure", name, measured) for name in data["measure"].values},
        "agreement": {str(name): row("agreement", name, agreed) for name in data["agreement"].values},
    }


def metrics(result: Result) -> dict[str, Any]:
    """Everything that `classify` found over all texts, as plain values."""
    data: Any = result.data
    overall = {
        str(m): {c: float(data[c].sel(metric=m)) for c in ("value", "ci_low", "ci_high")} for m in data["metric"].values
    }
    per_class = {
        str(label): {
            **{name: float(data[name].sel(label=label)) for name in ("precision", "recall", "f1")},
            "support": int(data["support"].sel(label=label)),
        }
        for label in data["label"].values
    }
    bins = [
        {
            "confidence": str(b), "n": int(data["bin_count"].sel(bin=b)),
            "mean_confidence": float(data["bin_confidence"].sel(bin=b)),
            "accuracy": float(data["bin_accuracy"].sel(bin=b)),
        }
        for b in data["bin"].values
    ]  # fmt: skip
    return {
        "n": int(data.sizes["example"]),
        "metrics": overall,
        "per_class": per_class,
        "confusion": {
            "labels": [str(label) for label in data["label"].values],
            "rows_are": "right class",
            "counts": data["confusion"].transpose("gold_label", "label").values.tolist(),
        },
        "calibration": bins,
    }


def explained(comparison: FinetunedComparison, name: str) -> dict[str, Any]:
    """Tokens, values and sums of every explained text, and the words that contribute most over all of them."""
    result = comparison.explanations[name]
    data: Any = result.data
    prediction: Any = comparison.scores[name].data["prediction"]
    rows: list[dict[str, Any]] = []
    for i in range(data.sizes["example"]):
        values = data["attribution"].transpose("example", "position").values[i]
        there = np.isfinite(values)
        row: dict[str, Any] = {
            "example": i,
            "text": comparison.texts[i],
            "label": comparison.gold[i],
            "prediction": str(prediction.values[i]),
            "tokens": [str(t) for t in data["token"].transpose("example", "position").values[i][there]],
            "values": [float(value) for value in values[there]],
            "score": float(data["score"][i]),
            "baseline_score": float(data["baseline_score"][i]),
        }
        for error in ("additivity_error", "completeness_error"):
            if error in data:
                row[error] = float(data[error][i])
        rows.append(row)
    target = comparison.labelling.names[-1] if len(comparison.labelling.names) == 2 else "the right label"
    return {
        "method": result.meta["method"],
        "baseline": result.meta["baseline"],
        "explains": f"log-odds of {target} against the other labels, in nats",
        "examples": rows,
        "words": [
            {
                "word": str(word),
                "mean_size": float(data["mean_size"][i]),
                "mean": float(data["mean_attribution"][i]),
                "n": int(data["occurrences"][i]),
            }
            for i, word in enumerate(data["term"].values[:TOP])
        ],
    }


def predictions(comparison: FinetunedComparison) -> str:
    """A line for each text."""
    lines = []
    for i, (text, gold) in enumerate(zip(comparison.texts, comparison.gold, strict=True)):
        row: dict[str, Any] = {"text": text, "label": gold}
        for name, result in comparison.scores.items():
            data: Any = result.data
            row[name] = str(data["prediction"].values[i])
            row[f"{name}_probability"] = float(data["confidence"].values[i])
        lines.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def badge_files(badge: str | Path) -> dict[str, str | bytes]:
    """The badge and what is known of it.

    Raises:
        OutputError: it cannot be read, is no SVG, or does more than draw.
    """
    if str(badge) == "":
        content, source = (package_files("mechinterp") / "report" / "badge.svg").read_bytes(), "mechinterp"
    else:
        path = Path(badge).expanduser()
        try:
            content, source = path.read_bytes(), path.name
        except OSError as error:
            raise OutputError(f"cannot read the badge {badge}: {error.strerror}; give an SVG file") from None
    if len(content) > LARGEST_BADGE:
        raise OutputError(f"the badge {badge} has {len(content):,} bytes; give an SVG file of at most 1 MiB")
    low = content.lower()
    if b"<!doctype" in low or b"<!entity" in low:
        raise OutputError(f"the badge {badge} declares a document type, which may hide anything; remove it")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise OutputError(f"the badge {badge} is no SVG ({error}); give an SVG file") from None
    if root.tag.rpartition("}")[2] != "svg":
        raise OutputError(f"the badge {badge} is <{root.tag.rpartition('}')[2]}>, not <svg>; give an SVG file")
    for element in root.iter():
        tag = str(element.tag).rpartition("}")[2].lower()
        acts = [a for a, v in element.attrib.items() if a.lower().startswith("on") or _leads_away(a, v)]
        if tag in ("script", "foreignobject", "iframe") or acts:
            what = f"an attribute {acts[0].rpartition('}')[2]}" if acts else f"<{tag}>"
            raise OutputError(f"the badge {badge} has {what}, and may only draw; remove it")
    found = root.findtext("{http://www.w3.org/2000/svg}title") or root.get("aria-label") or source
    about = {
        "file": BADGE, "title": found.strip(), "source": source, "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }  # fmt: skip
    return {BADGE: content, "project_badge.json": json.dumps(about, indent=1) + "\n"}


def _leads_away(attribute: str, value: str) -> bool:
    return attribute.rpartition("}")[2] == "href" and re.match(r"\s*(#|data:image/)", value) is None


def _named(results: Mapping[str, Result]) -> dict[str, Result]:
    return {NAMES[name]: result for name, result in results.items()}


def _png(figure: "Figure") -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
