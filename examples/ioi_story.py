"""How does SmolLM2 know whom John gave the drink to? From prompts to the heads that move the name.

    python examples/ioi_story.py [--quick] [--out FOLDER]

The prompts are those of Wang et al. (2023, "Interpretability in the wild"): "When Mary and John went to
the store, John gave a drink to" wants " Mary". Each has a corrupted twin in which the second name said is
the other one, so that the answer turns round. Every chapter asks one question and answers it by one run;
every number comes with its uncertainty, and a cell is only believed where q < .05.
"""

import argparse
from pathlib import Path

import pandas as pd

import mechinterp as mi
from mechinterp import sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few prompts: shows that it runs; nothing can be tested")
    parser.add_argument("--out", type=Path, help="save figures and tables here")
    options = parser.parse_args()
    model = mi.Model.load("smollm2")
    prompts = mi.tasks.ioi(n=4 if options.quick else 24, seed=0)
    results: dict[str, mi.Result] = {}

    chapter("1. Can it do the task?")
    print(prompts.texts[0], "->", prompts.answers[0][0][0] if prompts.answers else "")
    accuracy = mi.run(model, prompts, mi.Accuracy())
    print(accuracy.table().to_string(index=False))

    chapter("2. Where is the difference carried? Residual stream, by layer and named position")
    places = ("IO", "S1", "S2", "end")
    stream = results["stream"] = mi.run(model, prompts, mi.ActivationPatching("resid_pre", positions=places))
    effect = stream.data["effect"]
    for position in places:
        some = effect.sel(position=position)
        print(f"  at {position:>3}: " + " ".join(f"{float(some.sel(layer=i)):6.2f}" for i in range(0, 30, 3)))
    print(f"  layers   {' '.join(f'{i:6d}' for i in range(0, 30, 3))}")
    gone, there = (effect.sel(position=p) for p in ("S2", "end"))
    handed = next(int(i) for i in there["layer"] if float(there.sel(layer=i)) > float(gone.sel(layer=i)))
    print(f"The second name carries it at first; from layer {handed} on, the last token does.")

    chapter("3. Which parts hand it over? Attention and MLPs at the last token")
    parts = results["parts"] = mi.run(model, prompts, mi.ActivationPatching(("attn_out", "mlp_out"), positions="end"))
    print(largest(parts, ["kind", "layer"]))

    chapter("4. Which heads? Each head's output at the last token")
    heads = results["heads"] = mi.run(model, prompts, mi.ActivationPatching("z", positions="end", heads="each"))
    print(largest(heads, ["layer", "head"]))
    table = ranked(heads)
    layer, head = int(table.layer.iloc[0]), int(table["head"].iloc[0])

    chapter("5. Do they write to the logits themselves? Direct paths, everything else held")
    direct = results["direct"] = mi.run(model, prompts, mi.PathPatching("logits", positions="end"))
    print(largest(direct, ["layer", "head"]))

    chapter(f"6. What does head {layer}.{head} read? The corrupted run's query at the end, key and value at S2")
    group = model.dims.n_heads // model.dims.n_kv_heads
    kv = head // group
    rows = {
        "query at end": sites.q(layer, heads=head, positions="end"),
        "key at S2": sites.k(layer, heads=kv, positions="S2"),
        "value at S2": sites.v(layer, heads=kv, positions="S2"),
    }
    reads = results["reads"] = mi.sweep(model, prompts, rows)
    print(reads.table().round(4).to_string(index=False))
    print(f"(key/value head {kv} serves query heads {kv * group} to {kv * group + group - 1})")

    chapter("7. Where must the last token look? Its attention to each name cut, one layer at a time")
    cuts = {
        f"layer {i}, {p}": mi.Knockout(sites.scores(i, positions="end"), p)
        for i in sorted({layer - 1, layer, layer + 1} & set(range(model.dims.n_layers)))
        for p in ("IO", "S1", "S2")
    }
    results["cuts"] = mi.sweep(model, prompts, cuts)
    cut = results["cuts"].table()
    print(cut.round(4).to_string(index=False))
    costly = cut.loc[cut["change"].idxmin()]
    print(f"Its look at {costly['row'].split(', ')[1]} in {costly['row'].split(', ')[0]} costs most.")

    chapter("8. Without the strongest heads: one, two, four and eight of them, and as many at random")
    ablation = mi.Ablation("z", "mean", positions="end", cumulative=(1, 2, 4, 8))
    results["ablation"] = mi.run(model, prompts, ablation)
    together = results["ablation"].table("cumulative")
    print(together.round(4).to_string(index=False))
    costs = together.set_index(["order", "size"])["cumulative"]
    print(
        f"Eight of them cost {-costs['ranked', 8]:.1f} logits; eight at random (ten draws) {-costs['random', 8]:.1f}."
    )

    total = float((stream.data["clean"] - stream.data["corrupted"]).mean())
    value = results["reads"].table().set_index("row").loc["value at S2", "change"]
    own = direct.data["effect"].sel(layer=layer, head=head)
    alone = float(table["effect"].iloc[0])
    print(f"\nSo: the second name's stream hands over to the last token's at layer {handed}.")
    print(f"Head {layer}.{head} restores {alone:.0%} of the difference by itself; corrupted along its direct path to")
    print(f"the logits alone, it takes {float(own):.0%} of the difference away.")
    print(f"What it carries is its value at the second name: {-value / total:.0%} of the difference, with the heads")
    print(f"that share it. The names' own places are the same in both prompts, and yet needed: {costly['row']}, costs")
    print(f"{-costly['change']:.1f} logits when it cannot be looked at.")

    if options.out:
        for name, result in results.items():
            result.save(options.out / name)
        print(f"\nresults are in {options.out}; mi.Result.load(folder).figure() shows them")


def chapter(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def ranked(result: mi.Result) -> pd.DataFrame:
    """The cells of a patching result, the largest effect in front."""
    frame = result.table("effect")
    return frame.reindex(frame["effect"].abs().sort_values(ascending=False).index)


def largest(result: mi.Result, names: list[str]) -> str:
    shown = ranked(result)[[*names, "effect", "ci_low", "ci_high", "q"]].head(6)
    return shown.round(4).to_string(index=False)


if __name__ == "__main__":
    main()
