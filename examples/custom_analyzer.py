"""An analyzer of your own: how much each layer turns the residual stream, and whether it matters for the answer.

    python examples/custom_analyzer.py [--quick]

The first round measures the angle between the residual stream before and after each layer at the
last token. The second ablates the MLP of the layer that turns it most, and of the one that turns it
least, and measures the logit difference.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import mechinterp as mi
from mechinterp import sites


@dataclass(frozen=True)
class ResidualTurn(mi.Analyzer):
    """Angle between resid_pre and resid_post at each example's last token, in degrees."""

    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=[sites.resid_pre(positions="end"), sites.resid_post(positions="end")])

    def observe(self, batch: mi.Batch) -> mi.Part:
        before, after = batch.clean.stack("resid_pre"), batch.clean.stack("resid_post")  # layer example d_model
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        return mi.Part({"angle": (cosine.clamp(-1, 1).arccos().rad2deg(), "layer example")})

    def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
        view = mi.View("lines", "angle", "layer", title="How far each layer turns the residual stream", unit="degrees")
        return mi.Result.of(parts, unit="degrees", views=(view,))


@dataclass(frozen=True)
class AblateMostAndLeastTurning(ResidualTurn):
    """The second round: zero those two layers' MLPs and measure the logit difference."""

    def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Analyzer:
        angle = mi.Result.of(parts).data["angle"].mean("example")
        inner = angle.isel(layer=slice(1, -1))  # the first and last layer are special in every model
        return ZeroMLPs((int(inner.idxmax()), int(inner.idxmin())))


@dataclass(frozen=True)
class ZeroMLPs(mi.Analyzer):
    """Change of the logit difference when one layer's MLP writes nothing."""

    layers: tuple[int, ...]

    def needs(self, model: mi.Model) -> mi.Needs:
        sweep = mi.Sweep(mi.logit_diff(), sites.mlp_out(self.layers), write=mi.Zero, base="clean")
        return mi.Needs(sweeps={"without": sweep})

    def observe(self, batch: mi.Batch) -> mi.Part:
        without = batch.sweeps["without"]  # values: example layer
        change = without.values - without.base[:, None]
        return mi.Part({"change": (change, "example layer")}, coords={"layer": self.layers})


def main(quick: bool) -> None:
    model = mi.Model.load("smollm2")
    prompts = mi.tasks.ioi(n=8 if quick else 32)
    analyzers = [ResidualTurn(), AblateMostAndLeastTurning(), mi.LogitLens()]
    print(mi.plan(model, prompts, analyzers), "\n")
    turn, ablation, lens = mi.run(model, prompts, analyzers, progress=True)
    angles = turn.data["angle"].mean("example")
    print("Layers that turn the residual stream most, in degrees:")
    print(angles.to_series().sort_values(ascending=False).head(5).round(1).to_string(), "\n")
    base = float(lens.data["logit_diff"].isel(layer=-1).mean())
    print(f"Logit difference {base:.2f}; change without the MLP of")
    for layer, change in ablation.data["change"].mean("example").to_series().items():
        print(f"  layer {layer} (turns by {float(angles.sel(layer=layer)):.1f} degrees): {change:+.2f}")
    print("passes made:", ablation.meta["passes"])


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
