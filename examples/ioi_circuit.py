"""Which edges of SmolLM2 carry the indirect object's name? A circuit is found, tested on other prompts, and drawn.

    python examples/ioi_circuit.py [--quick] [--out FOLDER]

`examples/ioi_story.py` asks which heads matter; this asks which connections between them do. The edges are scored by
EAP-IG (Hanna et al. 2024) on one set of prompts. Whether they are a circuit is then asked of prompts that they were
not chosen on: is it faithful, is it better than chance, would other examples have given the same, is every edge needed?
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import mechinterp as mi
from mechinterp.studies import discover
from mechinterp.studies.evaluation import FRACTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few prompts: shows that it runs; nothing can be tested")
    parser.add_argument("--out", type=Path, help="the figures go here; by default a folder for temporary files")
    options = parser.parse_args()
    quick: bool = options.quick
    out: Path = options.out or Path(tempfile.gettempdir()) / "mechinterp-ioi-circuit"
    n, small_size, fractions = (2, 8, (0.001, 0.005, 1.0)) if quick else (24, 30, FRACTIONS)
    model = mi.Model.load("smollm2")
    pairs, others = mi.tasks.ioi(n, seed=0), mi.tasks.ioi(n, seed=1)
    again = len({*pairs.texts} & {*others.texts})

    chapter("1. Which edges? EAP-IG on the prompts, and the fewest edges that do what the model does")
    print(f"clean:      {pairs.texts[0]}\ncorrupted:  {pairs.corrupted[0] if pairs.corrupted else ''}")
    size = 0.002 if quick else None  # no search
    steps = 2 if quick else 5
    found = discover(model, pairs, "eap-ig", size=size, steps=steps)["mixed"]
    share = len(found) / len(found.graph)
    print(f"{len(found):,} of {len(found.graph):,} edges ({share:.1%}), between {len(found.nodes)} nodes,")
    print(
        f"have a faithfulness of {found.meta['faithfulness']:.2f} on the prompts that they were chosen on. The largest:"
    )
    print(found.edges.head(8).round(2).to_string(index=False))

    chapter(f"2. Is it so of other prompts? {n} with another seed, {again} of which are among the first")
    tested = found.faithfulness(model, others).data
    held_out = f"{float(tested['faithfulness']):.2f} ({float(tested['ci_low']):.2f} to {float(tested['ci_high']):.2f})"
    means = {name: float(tested[name].mean()) for name in ("full", "circuit", "empty")}
    print(f"The mean logit difference of the model is {means['full']:.2f}, of the circuit {means['circuit']:.2f},")
    print(f"and of the corrupted prompts {means['empty']:.2f}: a faithfulness of {held_out}.")

    chapter("3. Is it better than chance? The same scores, dealt to other edges at random")
    draws = [np.random.default_rng(seed).permutation(found.scores) for seed in range(2 if quick else 10)]
    curves = {
        "eap-ig": found.curve(model, others, fractions=fractions),
        "random": mi.Circuit(found.graph, draws[0]).curve(model, others, fractions=fractions),
    }
    print(by_fraction(curves).round(2).to_string())
    areas = pd.DataFrame([area(name, curve) for name, curve in curves.items()]).set_index("scores")
    print(areas.to_string())
    strewn = [mi.Circuit(found.graph, scores).top(len(found)) for scores in draws]
    chance = [float(one.faithfulness(model, others).data["faithfulness"]) for one in strewn]
    paths = [len(one.prune()) for one in strewn]
    low, high = min(chance), max(chance)
    print(
        f"{len(draws)} draws of {len(found):,} edges at random have a faithfulness of {low:.2f} to {high:.2f}. Of their"
    )
    print(f"edges {min(paths):,} to {max(paths):,} lie on a path from the embedding to the logits.")
    print("(CPR, of the most positive edges first, is better when high; CMD, of the largest first, when low)")

    chapter("4. Would other examples have given the same edges? Scores of examples drawn anew")
    small = of_size(found, small_size)
    each = mi.run(model, pairs, mi.EdgeAttribution("eap-ig-inputs", steps=steps, intervals=True)).data["scores"].values
    resamples = 20 if quick else 200
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples) / n
    resampled = weights @ each
    rows = [found.stability(resampled, k) for k in sorted({small_size, 100, 1000})]
    print(pd.DataFrame(rows)[["n", "stability", "stable", "to_this"]].round(2).to_string(index=False))
    print(f"(mean Jaccard index of the n best edges: over pairs of {resamples} resamples, and with the edges found)")
    small = replace(small, meta={**small.meta, **small.stability(resampled, small_size)})

    chapter(f"5. Is every edge needed? Each of {len(small)} strong edges that form paths, cut by itself")
    alone = small.faithfulness(model, others).data
    print(f"By themselves they have a faithfulness of {float(alone['faithfulness']):.2f}", end=" ")
    print(f"({float(alone['ci_low']):.2f} to {float(alone['ci_high']):.2f}). What each adds to that:")
    losses = small.minimality(model, others)
    columns = ["edge", "score", "loss", "ci_low", "ci_high", "q"]
    table = losses.data.to_dataframe().reset_index()[columns]
    print(table.head(10).round(3).to_string(index=False))
    needed, harmful = ((table.q < 0.05) & (sign * table.loss > 0) for sign in (1, -1))
    if quick:
        print(f"(of {n} examples nothing can be tested)")
    else:
        unclear = len(table) - int(needed.sum()) - int(harmful.sum())
        print(
            f"{int(needed.sum())} are needed (q < .05), {int(harmful.sum())} work against the answer,"
            f" {unclear} cannot be told."
        )

    chapter("6. Are these the heads that patching finds? Each head's output at the last token, as in ioi_story.py")
    patched = mi.run(model, pairs, mi.ActivationPatching("z", positions="end", heads="each")).table("effect")
    patched["name"] = [f"a{layer}.h{head}" for layer, head in zip(patched["layer"], patched["head"], strict=True)]
    patched = patched.reindex(patched["effect"].abs().sort_values(ascending=False).index).head(8)
    by_node = small.by_node().set_index("node")
    edges = found.by_node().set_index("node")
    for title, nodes in (("small", by_node), ("whole", edges)):
        patched[f"in the {title} circuit"] = patched["name"].isin(nodes.index)
    print(patched[["name", "effect", "in the small circuit", "in the whole circuit"]].round(3).to_string(index=False))
    heads = [name for name in by_node.index if ".h" in name]
    print(f"The {len(heads)} heads of the small circuit: {', '.join(heads)}.")
    to_logits = small.edges.query("receiver == 'logits'")
    for word, some in (("for", to_logits[to_logits.score > 0]), ("against", to_logits[to_logits.score < 0])):
        said = ", ".join(f"{s} ({v:+.2f})" for s, v in zip(some.sender, some.score, strict=True)) or "none"
        print(f"Directly {word} the right name: {said}.")

    first = patched.iloc[0]
    ways = edges_of(found, str(first["name"]))
    print(f"\nSo: {len(found):,} edges, {share:.1%} of all, do {held_out} of what the model does on prompts that they")
    print(f"were not chosen on. The head that patching puts first, {first['name']}, is in", end=" ")
    print("the small circuit too," if first["in the small circuit"] else "no edge of the small circuit,")
    print(f"and its strongest edge of all is {ways}. Of patching's {len(patched)} strongest heads the small circuit")
    print(
        f"has {int(patched['in the small circuit'].sum())}, the whole one {int(patched['in the whole circuit'].sum())}."
    )

    out.mkdir(parents=True, exist_ok=True)
    small.figure().write_html(out / "circuit.html", include_plotlyjs=True)
    curves["eap-ig"].figure().write_html(out / "curve.html", include_plotlyjs=True)
    found.save(out / "circuit.json")
    print(f"\n{out} has the small circuit and the curve as pages for a browser, which need no network, and")
    print("the whole circuit as circuit.json: mi.Circuit.load reads it back.")


def chapter(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


def of_size(circuit: mi.Circuit, size: int) -> mi.Circuit:
    """The best edges of which, without those on no path from embedding to logits, as many are left; or hardly fewer."""
    taken = size
    while len(circuit.top(taken + 1).prune()) <= size:
        taken += 1
    return circuit.top(taken).prune()


def by_fraction(curves: dict[str, mi.Result]) -> pd.DataFrame:
    """Faithfulness of the edges largest in size, a column for each curve."""
    frames = {name: curve.data.sel(ranking="absolute") for name, curve in curves.items()}
    table = pd.DataFrame({name: each["faithfulness"].to_series() for name, each in frames.items()})
    table.insert(0, "edges", next(iter(frames.values()))["edges"].to_series())
    return table


def area(name: str, curve: mi.Result) -> dict[str, str]:
    """The two numbers that MIB (Mueller et al. 2025) reports, with intervals."""
    row = {"scores": name}
    for kind, ranking in (("cpr", "signed"), ("cmd", "absolute")):
        value, low, high = (
            float(curve.data[f"{kind}{end}"].sel(ranking=ranking)) for end in ("", "_ci_low", "_ci_high")
        )
        row[kind.upper()] = f"{value:.3f} ({low:.3f} to {high:.3f})"
    return row


def edges_of(circuit: mi.Circuit, head: str) -> str:
    """The strongest edge from or into a head, in words."""
    rows = [
        (sender, receiver, score)
        for sender, receiver, score in circuit.edges.itertuples(index=False)
        if sender == head or head in circuit.graph.nodes_of(receiver)
    ]
    return f"{rows[0][0]} → {rows[0][1]} ({rows[0][2]:+.2f})" if rows else "none"


if __name__ == "__main__":
    main()
