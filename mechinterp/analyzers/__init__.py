"""One file per family of methods, and the table of them by name. They know the contract and models, never the engine.

Another package adds an analyzer by an entry point in the group ``mechinterp.analyzers``:

    [project.entry-points."mechinterp.analyzers"]
    my-analyzer = "my_package:MyAnalyzer"
"""

import difflib
import importlib.metadata
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from mechinterp.errors import NeedsError

if TYPE_CHECKING:
    from mechinterp.core.analyzer import Analyzer

GROUP = "mechinterp.analyzers"

TABLE = {
    name: EntryPoint(name, f"mechinterp.analyzers.{place}", GROUP)
    for name, place in {
        "ablation": "ablation:Ablation",
        "accuracy": "accuracy:Accuracy",
        "activation-patching": "patching:ActivationPatching",
        "activation-stats": "stats:ActivationStats",
        "attention-patterns": "patterns:AttentionPatterns",
        "attention-profile": "patterns:AttentionProfile",
        "attention-by-category": "categories:AttentionByCategory",
        "attribution-patching": "attribution:AttributionPatching",
        "causal-tracing": "tracing:CausalTracing",
        "classifier-weights": "classifier_weights:ClassifierWeights",
        "concept-association": "concept_directions:ConceptAssociation",
        "concept-directions": "concept_directions:ConceptDirections",
        "concept-bottleneck": "concept_bottleneck:ConceptBottleneck",
        "concept-neurons": "concept_neurons:ConceptNeurons",
        "cross-lingual": "cross_lingual:CrossLingual",
        "dimension-correlation": "dimensions:DimensionCorrelation",
        "direct-logit-attribution": "direct:DirectLogitAttribution",
        "edge-attribution": "edges:EdgeAttribution",
        "feature-effects": "feature_effects:FeatureEffects",
        "features": "features:Features",
        "gradient-analysis": "gradients:GradientAnalysis",
        "group-similarity": "similarity:GroupSimilarity",
        "head-clusters": "clusters:HeadClusters",
        "head-roles": "heads:HeadRoles",
        "head-weights": "head_weights:HeadWeights",
        "high-score-tokens": "trajectory:HighScoreTokens",
        "hotspots": "hotspots:Hotspots",
        "logit-lens": "lens:LogitLens",
        "max-activating": "max_activating:MaxActivating",
        "neuron-importance": "gradients:NeuronImportance",
        "path-patching": "paths:PathPatching",
        "probe": "probe:Probe",
        "probe-transfer": "probe:ProbeTransfer",
        "representation-map": "representation_map:RepresentationMap",
        "similarity": "similarity:Similarity",
        "spurious-patterns": "spurious:SpuriousPatterns",
        "steering": "steering:Steering",
        "syntactic-heads": "syntax:SyntacticHeads",
        "token-attribution": "token_attribution:TokenAttribution",
        "trajectory": "trajectory:Trajectory",
    }.items()
}
"""Our own analyzers, imported when they are found."""


def names() -> list[str]:
    """Every analyzer that is installed, ours and other packages', by the name that the command line takes."""
    return sorted({*TABLE, *importlib.metadata.entry_points(group=GROUP).names})


def find(name: str) -> "type[Analyzer]":
    """The class of an analyzer, by name.

    Raises:
        NeedsError: no package has it, several have it, or what it names is no analyzer.
    """
    from mechinterp.core.analyzer import Analyzer

    entry = locate(name)
    try:
        found: Any = entry.load()
    except Exception as error:
        raise NeedsError(
            f"analyzer {name!r} cannot be imported from {entry.value} ({type(error).__name__}: {error});"
            " install its package again, or what that lacks"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Analyzer)):
        raise NeedsError(f"analyzer {name!r} is {entry.value}, which is no subclass of mechinterp.Analyzer; name one")
    return found


def locate(name: str) -> EntryPoint:
    """Where an analyzer is; nothing is imported. A name of ours is always ours.

    Raises:
        NeedsError: no package has it, or several have it.
    """
    if name in TABLE:
        return TABLE[name]
    places = {entry.value: entry for entry in importlib.metadata.entry_points(group=GROUP, name=name)}
    if len(places) > 1:
        raise NeedsError(f"analyzer {name!r} is in {' and in '.join(sorted(places))}; uninstall all but one of them")
    if not places:
        known = names()
        near = difflib.get_close_matches(name.lower(), known, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise NeedsError(f"there is no analyzer {name!r}; {meant}known are {', '.join(known)}")
    return next(iter(places.values()))
