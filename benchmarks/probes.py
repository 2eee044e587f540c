"""Probes of all residual sites at once, beside a loop of scikit-learn; and what it costs to collect their features.

2,000 prompts of SmolLM2 (which of two names comes second, with every tenth label turned), 31 sites of the residual
stream at the last token, 576 features, 5 folds. The loop makes a `StandardScaler` and a `LogisticRegression` (C = 1,
all else as it comes) for every site and fold; ours has the same folds, labels and penalty. The penalised objective of
every fit is computed in float64 from its weights; the largest excess of ours over theirs is printed.

Features: the run of a probe over the same prompts, less the fits, beside one bare forward of the decoder over the
same batches; and the peak memory above the model's, in a process of its own, as a multiple of the features kept.
"""

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import mechinterp as mi
from benchmarks.timing import arguments, compare, environment, interleave, peak_of, report
from mechinterp.analyzers.fitting import logistic
from mechinterp.analyzers.probe_data import Probed
from mechinterp.analyzers.units import features
from mechinterp.core.analyzer import Context
from mechinterp.core.result import Result

EXAMPLES, FOLDS = 2000, 5
BATCH = 64


class Collected(mi.Probe):
    """A probe that stops where its features are together."""

    def combine(self, parts: Any, context: Context) -> Result:
        x, _, _ = features(parts)
        return Result.of([mi.Part(x.mean((0, 2)), "example", rows=tuple(range(x.shape[1])))])


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--peak":
        print(peak(int(sys.argv[2])))
        return
    options = arguments(__doc__)
    n = 200 if options.quick else EXAMPLES
    model, examples = mi.Model.load("smollm2"), prompts(n)
    x, data = collected(model, examples)
    if options.quick:
        x = x[::10]
    held = torch.from_numpy(data.held)
    y = torch.from_numpy(data.y).expand(FOLDS, -1)
    ours: list[Any] = []
    theirs: list[list[tuple[np.ndarray, float]]] = []

    def fit() -> None:
        ours[:] = [logistic(one, y, ~held, 2) for one in x]

    def loop() -> None:
        theirs[:] = [[sklearn(one[~fold].numpy(), data.y[~fold]) for fold in data.held] for one in x]

    seconds = interleave({"ours": fit, "theirs": loop}, 1 if options.quick else 3)
    work = f"{len(x)} sites × {FOLDS} folds, {n:,} examples"
    lines = [compare(work, seconds["ours"], "LogisticRegression", seconds["theirs"], 0.1)]
    excess = [
        objective(one[~fold].numpy(), data.y[~fold], fits.weight[i, 0].numpy(), float(fits.bias[i]))
        / objective(one[~fold].numpy(), data.y[~fold], w, b)
        - 1
        for one, fits, made in zip(x, ours, theirs, strict=True)
        for i, (fold, (w, b)) in enumerate(zip(data.held, made, strict=True))
    ]
    probe = Collected(control=False)
    ways = {
        "ours": lambda: mi.run(model, examples, probe, batch_size=BATCH),
        "forward": lambda: bare(model, examples),
    }
    ways["forward"]()
    seconds = interleave(ways, 1 if options.quick else 5)
    lines.append(
        compare(f"features of 31 sites, {n:,} prompts", seconds["ours"], "bare forward", seconds["forward"], 1.1)
    )
    kept = 31 * n * model.dims.d_model * 4 / 1e6
    used = float(subprocess.run(
        [sys.executable, "-m", "benchmarks.probes", "--peak", str(n)], capture_output=True, text=True, check=True
    ).stdout.split()[-1])  # fmt: skip
    facts = environment(model="smollm2", threads=torch.get_num_threads(), kept_mb=round(kept, 1), peak_mb=used)
    report("Probes", lines, facts, options.json)
    print(f"objective: ours over theirs, at most {max(excess):+.1e}, median {np.median(excess):+.1e} (asked at most 0)")
    print(f"fits that did not converge: {sum(int((~fits.converged).sum()) for fits in ours)} of {len(x) * FOLDS}")
    print(f"peak memory above the model's: {used} MB, {used / kept:.2f} × the {kept:.1f} MB of features kept")


def prompts(n: int) -> mi.Examples:
    """Half of them with the repeated name first; every tenth label is turned, so that no line parts them."""
    drawn = mi.tasks.ioi(n, seed=0)
    rng = np.random.default_rng(0)
    labels = []
    for text, sides in zip(drawn.texts, drawn.answers or (), strict=True):
        assert isinstance(text, str)
        first = text.index(str(sides[0][0]).strip()) < text.index(str(sides[1][0]).strip())
        labels.append("first" if first != (rng.random() < 0.1) else "second")
    return mi.Examples.of(drawn.texts, labels=labels)


def collected(model: mi.Model, examples: mi.Examples) -> tuple[torch.Tensor, Probed]:
    """Features ``site unit dim``, and labels and folds."""
    got: list[tuple[torch.Tensor, Probed]] = []

    class Keeping(mi.Probe):
        def combine(self, parts: Any, context: Context) -> Result:
            x, owner, tokens = features(parts)
            data = Probed.of(context.tokens, owner, tokens, None, None, FOLDS, 0, False)
            got.append((x, data))
            return Result.of([mi.Part(torch.zeros(x.shape[1]), "example", rows=tuple(range(x.shape[1])))])

    mi.run(model, examples, Keeping(), batch_size=BATCH)
    return got[0]


def sklearn(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weight and bias of the fit, in the features' own scale."""
    scaler = StandardScaler().fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fit that stops after 100 steps, as it comes
        made = LogisticRegression().fit(scaler.transform(x), y)
    weight = made.coef_[0] / scaler.scale_
    return weight, float(made.intercept_[0] - weight @ scaler.mean_)


def objective(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: float) -> float:
    """The summed loss and half the squared weight on standardised features, in float64."""
    z = x.astype(np.float64)
    logits = z @ weight.astype(np.float64) + bias
    loss = np.logaddexp(0, np.where(y == 1, -logits, logits)).sum()
    scale = z.std(0)
    return float(loss + 0.5 * ((weight * np.where(scale > 0, scale, 1.0)) ** 2).sum())


@torch.no_grad()
def bare(model: mi.Model, examples: mi.Examples) -> None:
    """One forward of the decoder over the batches that the runner makes: sorted by length."""
    ids = sorted(examples.tokenize(model.tokenizer).ids, key=len, reverse=True)
    body: Any = model.hf.get_submodule(model.arch.base)
    for i in range(0, len(ids), BATCH):
        some = ids[i : i + BATCH]
        wide = max(map(len, some))
        batch = torch.tensor([[*one, *[0] * (wide - len(one))] for one in some])
        mask = torch.tensor([[1] * len(one) + [0] * (wide - len(one)) for one in some])
        body(batch, attention_mask=mask, use_cache=False)


def peak(n: int) -> float:
    """MB above the model's."""
    model, examples = mi.Model.load("smollm2"), prompts(n)
    mi.run(model, prompts(8), Collected(control=False), batch_size=BATCH)
    return round(peak_of(lambda: mi.run(model, examples, Collected(control=False), batch_size=BATCH)) / 1e6, 1)


if __name__ == "__main__":
    main()
