"""Studies: functions above the engine, for what is not one round over examples."""

from mechinterp.studies.agreement import attribution_agreement as attribution_agreement
from mechinterp.studies.agreement import compare_attributions as compare_attributions
from mechinterp.studies.any_classifier import attribute_classifier as attribute_classifier
from mechinterp.studies.attention import AttentionStudy as AttentionStudy
from mechinterp.studies.attention import attention_study as attention_study
from mechinterp.studies.bottleneck import concept_bottleneck as concept_bottleneck
from mechinterp.studies.circuits import Circuit as Circuit
from mechinterp.studies.classical import TfidfClassifier as TfidfClassifier
from mechinterp.studies.classical import tfidf_classifier as tfidf_classifier
from mechinterp.studies.classification import classify as classify
from mechinterp.studies.classifier import shorten as shorten
from mechinterp.studies.comparing import compare_attention as compare_attention
from mechinterp.studies.comparing import compare_models as compare_models
from mechinterp.studies.concepts import ConceptStudy as ConceptStudy
from mechinterp.studies.concepts import concept_study as concept_study
from mechinterp.studies.concepts import safety_study as safety_study
from mechinterp.studies.configuration import StudyConfig as StudyConfig
from mechinterp.studies.dialogue import AttentionBetweenSpeakers as AttentionBetweenSpeakers
from mechinterp.studies.dialogue import Dialogue as Dialogue
from mechinterp.studies.discovery import discover as discover
from mechinterp.studies.erasing import erase_tokens as erase_tokens
from mechinterp.studies.evaluation import completeness as completeness
from mechinterp.studies.evaluation import faithfulness as faithfulness
from mechinterp.studies.evaluation import faithfulness_curve as faithfulness_curve
from mechinterp.studies.evaluation import minimality as minimality
from mechinterp.studies.explaining import Explanation as Explanation
from mechinterp.studies.explaining import explain_prediction as explain_prediction
from mechinterp.studies.finetuned import FinetunedComparison as FinetunedComparison
from mechinterp.studies.finetuned import compare_finetuned as compare_finetuned
from mechinterp.studies.finetuning import finetune as finetune
from mechinterp.studies.flow import Flow as Flow
from mechinterp.studies.flow import trace_information_flow as trace_information_flow
from mechinterp.studies.labelled import Labelled as Labelled
from mechinterp.studies.labelled import read_labelled as read_labelled
from mechinterp.studies.parallel import Parallel as Parallel
from mechinterp.studies.parallel import read_parallel as read_parallel
from mechinterp.studies.representations import compare_representations as compare_representations
from mechinterp.studies.representations import concept_drift as concept_drift
from mechinterp.studies.steering import steered_text as steered_text
from mechinterp.studies.training import Training as Training

__all__ = [
    "AttentionBetweenSpeakers",
    "AttentionStudy",
    "Circuit",
    "ConceptStudy",
    "Dialogue",
    "Explanation",
    "FinetunedComparison",
    "Labelled",
    "Parallel",
    "Training",
    "Flow",
    "TfidfClassifier",
    "attribute_classifier",
    "attribution_agreement",
    "compare_attention",
    "compare_attributions",
    "compare_finetuned",
    "compare_models",
    "compare_representations",
    "concept_drift",
    "StudyConfig",
    "attention_study",
    "classify",
    "completeness",
    "concept_study",
    "concept_bottleneck",
    "discover",
    "erase_tokens",
    "explain_prediction",
    "faithfulness",
    "faithfulness_curve",
    "finetune",
    "minimality",
    "read_labelled",
    "safety_study",
    "read_parallel",
    "shorten",
    "steered_text",
    "tfidf_classifier",
    "trace_information_flow",
]
