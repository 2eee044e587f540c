"""A research script from start to end: which heads move the indirect object's name, and is it so?

    python examples/research_script.py [--quick]

1. One shared pass: where does the answer appear (lens), who writes it (direct attribution), what do
   these heads attend to (roles)?
2. Is it so? Patch each head's output, at the last token, from the clean into the corrupted run.
3. Steer by hand: ablate the strongest head while the model generates.
"""

import sys

import numpy as np

import mechinterp as mi
from mechinterp import sites


def main(quick: bool) -> None:
    model = mi.Model.load("smollm2")
    print(model, "\n")
    prompts = mi.tasks.ioi(n=8 if quick else 32, seed=0)
    print("clean:    ", prompts.texts[0])
    print("corrupted:", prompts.corrupted[0], "\n")

    lens, direct, roles = mi.run(
        model, prompts, [mi.LogitLens(), mi.DirectLogitAttribution(), mi.HeadRoles()], progress=True
    )
    last = lens.data.isel(layer=-1)
    right = int((last["logit_diff"] > 0).sum())
    print(f"The model is right on {right} of {len(prompts)} prompts, mean logit difference", end=" ")
    print(f"{float(last['logit_diff'].mean()):.2f}; passes made: {lens.meta['passes']['forward']}\n")

    heads = direct.table("mean").query("type == 'head'").sort_values("mean", ascending=False)
    print("Heads that write the answer:")
    print(heads[["component", "mean", "ci_low", "ci_high", "q"]].head(5).round(3).to_string(index=False), "\n")
    print("What they attend to in the prompts (share of attention):")
    table = roles.table().query("text == 'prompts' and role in ['previous', 'first', 'duplicate']")
    wide = table.pivot(index=["layer", "head"], columns="role", values="score")
    print(wide.loc[[(r.layer, r.head) for r in heads.head(5).itertuples()]].round(2).to_string(), "\n")

    # The last eight layers hold every strong head; positions are named, since the prompts differ in shape.
    layers = tuple(range(22, 30)) if not quick else (23,)
    patching = mi.ActivationPatching("z", heads="each", positions="end", layers=layers)
    print(mi.plan(model, prompts, patching), "\n")
    patched = mi.run(model, prompts, patching, progress=True)
    table = patched.table().sort_values("effect", ascending=False)
    print("Heads that restore the answer when patched at the last token (1 is all of it):")
    print(table.head(5).round(3).to_string(index=False), "\n")
    best = table.iloc[0]
    chosen = sites.z(int(best["layer"]), heads=int(best["head"]))

    prompt = prompts.texts[0]
    print("model writes:      ", model.generate(prompt, max_new_tokens=8))
    with model.intervene(mi.Zero(chosen)):
        print(f"without {chosen}: ", model.generate(prompt, max_new_tokens=8))
        ablated = mi.run(model, prompts, mi.LogitLens(layers=(29,)))
    change = ablated.data["logit_diff"].values - last["logit_diff"].values
    print(f"its ablation changes the logit difference by {np.mean(change):+.2f} on average")


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
