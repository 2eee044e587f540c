import inspect
import pkgutil
import subprocess
import sys

import mechinterp as mi
from mechinterp import errors

NAMES = [
    "Model",
    "FactoredMatrix",
    "Site",
    "Sites",
    "Examples",
    "Chat",
    "Sentences",
    "Vocabulary",
    "TokenBatch",
    "Trace",
    "Read",
    "Reduce",
    "Intervention",
    "Replace",
    "Add",
    "Scale",
    "Zero",
    "Mean",
    "Noise",
    "Project",
    "Steer",
    "Knockout",
    "Apply",
    "SparseAutoencoder",
    "EditFeatures",
    "Metric",
    "log_odds",
    "logit_diff",
    "answer_logit",
    "answer_prob",
    "kl",
    "loss",
    "Analyzer",
    "Needs",
    "Own",
    "Grad",
    "Sweep",
    "Edit",
    "Path",
    "Batch",
    "Context",
    "Part",
    "Result",
    "View",
    "Plan",
    "plan",
    "run",
    "sweep",
    "verify",
    "Verification",
    "Accuracy",
    "ActivationStats",
    "LogitLens",
    "DirectLogitAttribution",
    "AttentionPatterns",
    "AttentionProfile",
    "HeadRoles",
    "HeadWeights",
    "HeadClusters",
    "Hotspots",
    "SyntacticHeads",
    "AttentionByCategory",
    "ActivationPatching",
    "AttributionPatching",
    "CausalTracing",
    "PathPatching",
    "Ablation",
    "EdgeAttribution",
    "GradientAnalysis",
    "NeuronImportance",
    "MaxActivating",
    "ConceptNeurons",
    "TokenAttribution",
    "ClassifierWeights",
    "Trajectory",
    "HighScoreTokens",
    "SpuriousPatterns",
    "DimensionCorrelation",
    "Probe",
    "ProbeTransfer",
    "LinearProbe",
    "ConceptDirections",
    "ConceptAssociation",
    "Steering",
    "Features",
    "FeatureEffects",
    "ConceptBottleneck",
    "Similarity",
    "GroupSimilarity",
    "CrossLingual",
    "RepresentationMap",
    "load_classifier",
    "save_classifier",
    "train_classifier",
    "classifier_report",
    "ClassifierReport",
    "Circuit",
    "classify",
    "tfidf_classifier",
    "TfidfClassifier",
    "errors",
    "sites",
    "studies",
    "tasks",
    "testing",
]


def test_all_is_exactly_the_public_names() -> None:
    assert sorted(mi.__all__) == sorted(NAMES)
    assert all(getattr(mi, name) is not None for name in NAMES)
    assert set(dir(mi)) == {*NAMES, "__version__"}


def test_every_public_name_is_documented() -> None:
    for name in NAMES:
        assert (inspect.getdoc(getattr(mi, name)) or "").strip(), name


def test_the_exception_tree_is_as_drawn() -> None:
    doc = errors.__doc__ or ""
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.MechinterpError)
        assert name in doc
    assert issubclass(errors.AlignmentError, errors.ExamplesError)


def test_every_module_imports_alone() -> None:
    names = [m.name for m in pkgutil.walk_packages(mi.__path__, "mechinterp.")]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *reversed(names)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(names) > 20
