"""Mechanistic interpretability of Qwen and Llama models.

Analyzers say what they need; the engine finds the fewest passes that give it to all of them.

    import mechinterp as mi
    model = mi.Model.load("smollm2")
    lens, heads = mi.run(model, mi.tasks.ioi(n=32), [mi.LogitLens(), mi.HeadRoles()])

Importing this package imports neither torch nor transformers; names arrive when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Model": "mechinterp.model.model",
    "Site": "mechinterp.sites",
    "Sites": "mechinterp.sites",
    "Examples": "mechinterp.core.examples",
    "Chat": "mechinterp.core.examples",
    "TokenBatch": "mechinterp.core.examples",
    "Trace": "mechinterp.core.trace",
    "Read": "mechinterp.core.trace",
    "Reduce": "mechinterp.core.trace",
    "Intervention": "mechinterp.core.interventions",
    "Replace": "mechinterp.core.interventions",
    "Add": "mechinterp.core.interventions",
    "Scale": "mechinterp.core.interventions",
    "Zero": "mechinterp.core.interventions",
    "Mean": "mechinterp.core.interventions",
    "Noise": "mechinterp.core.interventions",
    "Project": "mechinterp.core.interventions",
    "Steer": "mechinterp.core.interventions",
    "Apply": "mechinterp.core.interventions",
    "Metric": "mechinterp.core.metrics",
    "logit_diff": "mechinterp.core.metrics",
    "answer_logit": "mechinterp.core.metrics",
    "answer_prob": "mechinterp.core.metrics",
    "kl": "mechinterp.core.metrics",
    "loss": "mechinterp.core.metrics",
    "Analyzer": "mechinterp.core.analyzer",
    "Needs": "mechinterp.core.analyzer",
    "Own": "mechinterp.core.analyzer",
    "Grad": "mechinterp.core.analyzer",
    "Sweep": "mechinterp.core.analyzer",
    "Edit": "mechinterp.core.analyzer",
    "Batch": "mechinterp.core.analyzer",
    "Context": "mechinterp.core.analyzer",
    "Part": "mechinterp.core.result",
    "Result": "mechinterp.core.result",
    "View": "mechinterp.core.result",
    "Plan": "mechinterp.engine.plan",
    "plan": "mechinterp.engine.plan",
    "run": "mechinterp.engine.runner",
    "LogitLens": "mechinterp.analyzers.lens",
    "DirectLogitAttribution": "mechinterp.analyzers.direct",
    "HeadRoles": "mechinterp.analyzers.heads",
    "ActivationPatching": "mechinterp.analyzers.patching",
}
_MODULES = ("errors", "sites", "tasks", "testing")

__all__ = [*_NAMES, *_MODULES]

if TYPE_CHECKING:
    from mechinterp import errors, sites, tasks, testing
    from mechinterp.analyzers.direct import DirectLogitAttribution
    from mechinterp.analyzers.heads import HeadRoles
    from mechinterp.analyzers.lens import LogitLens
    from mechinterp.analyzers.patching import ActivationPatching
    from mechinterp.core.analyzer import Analyzer, Batch, Context, Edit, Grad, Needs, Own, Sweep
    from mechinterp.core.examples import Chat, Examples, TokenBatch
    from mechinterp.core.interventions import (
        Add,
        Apply,
        Intervention,
        Mean,
        Noise,
        Project,
        Replace,
        Scale,
        Steer,
        Zero,
    )
    from mechinterp.core.metrics import Metric, answer_logit, answer_prob, kl, logit_diff, loss
    from mechinterp.core.result import Part, Result, View
    from mechinterp.core.trace import Read, Reduce, Trace
    from mechinterp.engine.plan import Plan, plan
    from mechinterp.engine.runner import run
    from mechinterp.model.model import Model
    from mechinterp.sites import Site, Sites


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mechinterp.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'mechinterp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
