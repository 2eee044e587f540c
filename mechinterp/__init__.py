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
    "FactoredMatrix": "mechinterp.model.factored",
    "Site": "mechinterp.sites",
    "Sites": "mechinterp.sites",
    "Examples": "mechinterp.core.examples",
    "Chat": "mechinterp.core.examples",
    "Sentences": "mechinterp.core.sentences",
    "Vocabulary": "mechinterp.core.vocabulary",
    "TokenBatch": "mechinterp.core.tokens",
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
    "Knockout": "mechinterp.core.interventions",
    "Apply": "mechinterp.core.interventions",
    "SparseAutoencoder": "mechinterp.model.autoencoder",
    "EditFeatures": "mechinterp.model.autoencoder",
    "Metric": "mechinterp.core.metrics",
    "log_odds": "mechinterp.core.metrics",
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
    "Path": "mechinterp.core.analyzer",
    "Batch": "mechinterp.core.analyzer",
    "Context": "mechinterp.core.analyzer",
    "Part": "mechinterp.core.result",
    "Result": "mechinterp.core.result",
    "View": "mechinterp.core.result",
    "Plan": "mechinterp.engine.plan",
    "plan": "mechinterp.engine.plan",
    "run": "mechinterp.engine.runner",
    "sweep": "mechinterp.engine.rows",
    "verify": "mechinterp.engine.verify",
    "Verification": "mechinterp.engine.verify",
    "Accuracy": "mechinterp.analyzers.accuracy",
    "ActivationStats": "mechinterp.analyzers.stats",
    "LogitLens": "mechinterp.analyzers.lens",
    "DirectLogitAttribution": "mechinterp.analyzers.direct",
    "AttentionPatterns": "mechinterp.analyzers.patterns",
    "AttentionProfile": "mechinterp.analyzers.patterns",
    "HeadRoles": "mechinterp.analyzers.heads",
    "HeadWeights": "mechinterp.analyzers.head_weights",
    "HeadClusters": "mechinterp.analyzers.clusters",
    "Hotspots": "mechinterp.analyzers.hotspots",
    "SyntacticHeads": "mechinterp.analyzers.syntax",
    "AttentionByCategory": "mechinterp.analyzers.categories",
    "ActivationPatching": "mechinterp.analyzers.patching",
    "AttributionPatching": "mechinterp.analyzers.attribution",
    "CausalTracing": "mechinterp.analyzers.tracing",
    "PathPatching": "mechinterp.analyzers.paths",
    "Ablation": "mechinterp.analyzers.ablation",
    "EdgeAttribution": "mechinterp.analyzers.edges",
    "GradientAnalysis": "mechinterp.analyzers.gradients",
    "NeuronImportance": "mechinterp.analyzers.gradients",
    "MaxActivating": "mechinterp.analyzers.max_activating",
    "ConceptNeurons": "mechinterp.analyzers.concept_neurons",
    "TokenAttribution": "mechinterp.analyzers.token_attribution",
    "ClassifierWeights": "mechinterp.analyzers.classifier_weights",
    "Trajectory": "mechinterp.analyzers.trajectory",
    "HighScoreTokens": "mechinterp.analyzers.trajectory",
    "SpuriousPatterns": "mechinterp.analyzers.spurious",
    "DimensionCorrelation": "mechinterp.analyzers.dimensions",
    "Probe": "mechinterp.analyzers.probe",
    "ProbeTransfer": "mechinterp.analyzers.probe",
    "LinearProbe": "mechinterp.core.linear_probe",
    "ConceptDirections": "mechinterp.analyzers.concept_directions",
    "ConceptAssociation": "mechinterp.analyzers.concept_directions",
    "Steering": "mechinterp.analyzers.steering",
    "Features": "mechinterp.analyzers.features",
    "FeatureEffects": "mechinterp.analyzers.feature_effects",
    "ConceptBottleneck": "mechinterp.analyzers.concept_bottleneck",
    "Similarity": "mechinterp.analyzers.similarity",
    "GroupSimilarity": "mechinterp.analyzers.similarity",
    "CrossLingual": "mechinterp.analyzers.cross_lingual",
    "RepresentationMap": "mechinterp.analyzers.representation_map",
    "load_classifier": "mechinterp.model.classifier",
    "save_classifier": "mechinterp.model.classifier",
    "train_classifier": "mechinterp.studies.classifier_training",
    "classifier_report": "mechinterp.studies.classifier",
    "ClassifierReport": "mechinterp.studies.classifier",
    "Circuit": "mechinterp.studies.circuits",
    "classify": "mechinterp.studies.classification",
    "tfidf_classifier": "mechinterp.studies.classical",
    "TfidfClassifier": "mechinterp.studies.classical",
}
_MODULES = ("errors", "sites", "studies", "tasks", "testing")

__all__ = [*_NAMES, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll] -- the re-exports below serve checkers

if TYPE_CHECKING:
    from mechinterp import errors as errors
    from mechinterp import sites as sites
    from mechinterp import studies as studies
    from mechinterp import tasks as tasks
    from mechinterp import testing as testing
    from mechinterp.analyzers.ablation import Ablation as Ablation
    from mechinterp.analyzers.accuracy import Accuracy as Accuracy
    from mechinterp.analyzers.attribution import AttributionPatching as AttributionPatching
    from mechinterp.analyzers.categories import AttentionByCategory as AttentionByCategory
    from mechinterp.analyzers.classifier_weights import ClassifierWeights as ClassifierWeights
    from mechinterp.analyzers.clusters import HeadClusters as HeadClusters
    from mechinterp.analyzers.concept_bottleneck import ConceptBottleneck as ConceptBottleneck
    from mechinterp.analyzers.concept_directions import ConceptAssociation as ConceptAssociation
    from mechinterp.analyzers.concept_directions import ConceptDirections as ConceptDirections
    from mechinterp.analyzers.concept_neurons import ConceptNeurons as ConceptNeurons
    from mechinterp.analyzers.cross_lingual import CrossLingual as CrossLingual
    from mechinterp.analyzers.dimensions import DimensionCorrelation as DimensionCorrelation
    from mechinterp.analyzers.direct import DirectLogitAttribution as DirectLogitAttribution
    from mechinterp.analyzers.edges import EdgeAttribution as EdgeAttribution
    from mechinterp.analyzers.feature_effects import FeatureEffects as FeatureEffects
    from mechinterp.analyzers.features import Features as Features
    from mechinterp.analyzers.gradients import GradientAnalysis as GradientAnalysis
    from mechinterp.analyzers.gradients import NeuronImportance as NeuronImportance
    from mechinterp.analyzers.head_weights import HeadWeights as HeadWeights
    from mechinterp.analyzers.heads import HeadRoles as HeadRoles
    from mechinterp.analyzers.hotspots import Hotspots as Hotspots
    from mechinterp.analyzers.lens import LogitLens as LogitLens
    from mechinterp.analyzers.max_activating import MaxActivating as MaxActivating
    from mechinterp.analyzers.patching import ActivationPatching as ActivationPatching
    from mechinterp.analyzers.paths import PathPatching as PathPatching
    from mechinterp.analyzers.patterns import AttentionPatterns as AttentionPatterns
    from mechinterp.analyzers.patterns import AttentionProfile as AttentionProfile
    from mechinterp.analyzers.probe import Probe as Probe
    from mechinterp.analyzers.probe import ProbeTransfer as ProbeTransfer
    from mechinterp.analyzers.representation_map import RepresentationMap as RepresentationMap
    from mechinterp.analyzers.similarity import GroupSimilarity as GroupSimilarity
    from mechinterp.analyzers.similarity import Similarity as Similarity
    from mechinterp.analyzers.spurious import SpuriousPatterns as SpuriousPatterns
    from mechinterp.analyzers.stats import ActivationStats as ActivationStats
    from mechinterp.analyzers.steering import Steering as Steering
    from mechinterp.analyzers.syntax import SyntacticHeads as SyntacticHeads
    from mechinterp.analyzers.token_attribution import TokenAttribution as TokenAttribution
    from mechinterp.analyzers.tracing import CausalTracing as CausalTracing
    from mechinterp.analyzers.trajectory import HighScoreTokens as HighScoreTokens
    from mechinterp.analyzers.trajectory import Trajectory as Trajectory
    from mechinterp.core.analyzer import (
        Analyzer as Analyzer,
    )
    from mechinterp.core.analyzer import (
        Batch as Batch,
    )
    from mechinterp.core.analyzer import (
        Context as Context,
    )
    from mechinterp.core.analyzer import (
        Edit as Edit,
    )
    from mechinterp.core.analyzer import (
        Grad as Grad,
    )
    from mechinterp.core.analyzer import (
        Needs as Needs,
    )
    from mechinterp.core.analyzer import (
        Own as Own,
    )
    from mechinterp.core.analyzer import (
        Path as Path,
    )
    from mechinterp.core.analyzer import (
        Sweep as Sweep,
    )
    from mechinterp.core.examples import Chat as Chat
    from mechinterp.core.examples import Examples as Examples
    from mechinterp.core.interventions import (
        Add as Add,
    )
    from mechinterp.core.interventions import (
        Apply as Apply,
    )
    from mechinterp.core.interventions import (
        Intervention as Intervention,
    )
    from mechinterp.core.interventions import (
        Knockout as Knockout,
    )
    from mechinterp.core.interventions import (
        Mean as Mean,
    )
    from mechinterp.core.interventions import (
        Noise as Noise,
    )
    from mechinterp.core.interventions import (
        Project as Project,
    )
    from mechinterp.core.interventions import (
        Replace as Replace,
    )
    from mechinterp.core.interventions import (
        Scale as Scale,
    )
    from mechinterp.core.interventions import (
        Steer as Steer,
    )
    from mechinterp.core.interventions import (
        Zero as Zero,
    )
    from mechinterp.core.linear_probe import LinearProbe as LinearProbe
    from mechinterp.core.metrics import (
        Metric as Metric,
    )
    from mechinterp.core.metrics import (
        answer_logit as answer_logit,
    )
    from mechinterp.core.metrics import (
        answer_prob as answer_prob,
    )
    from mechinterp.core.metrics import (
        kl as kl,
    )
    from mechinterp.core.metrics import (
        log_odds as log_odds,
    )
    from mechinterp.core.metrics import (
        logit_diff as logit_diff,
    )
    from mechinterp.core.metrics import (
        loss as loss,
    )
    from mechinterp.core.result import Part as Part
    from mechinterp.core.result import Result as Result
    from mechinterp.core.result import View as View
    from mechinterp.core.sentences import Sentences as Sentences
    from mechinterp.core.tokens import TokenBatch as TokenBatch
    from mechinterp.core.trace import Read as Read
    from mechinterp.core.trace import Reduce as Reduce
    from mechinterp.core.trace import Trace as Trace
    from mechinterp.core.vocabulary import Vocabulary as Vocabulary
    from mechinterp.engine.plan import Plan as Plan
    from mechinterp.engine.plan import plan as plan
    from mechinterp.engine.rows import sweep as sweep
    from mechinterp.engine.runner import run as run
    from mechinterp.engine.verify import Verification as Verification
    from mechinterp.engine.verify import verify as verify
    from mechinterp.model.autoencoder import EditFeatures as EditFeatures
    from mechinterp.model.autoencoder import SparseAutoencoder as SparseAutoencoder
    from mechinterp.model.classifier import load_classifier as load_classifier
    from mechinterp.model.classifier import save_classifier as save_classifier
    from mechinterp.model.factored import FactoredMatrix as FactoredMatrix
    from mechinterp.model.model import Model as Model
    from mechinterp.sites import Site as Site
    from mechinterp.sites import Sites as Sites
    from mechinterp.studies.circuits import Circuit as Circuit
    from mechinterp.studies.classical import TfidfClassifier as TfidfClassifier
    from mechinterp.studies.classical import tfidf_classifier as tfidf_classifier
    from mechinterp.studies.classification import classify as classify
    from mechinterp.studies.classifier import ClassifierReport as ClassifierReport
    from mechinterp.studies.classifier import classifier_report as classifier_report
    from mechinterp.studies.classifier_training import train_classifier as train_classifier


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
