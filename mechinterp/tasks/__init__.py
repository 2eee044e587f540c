"""Prompt generators: behaviours that models are known for, with answers and named positions.

`sentences` makes labelled words for probes, and `concepts` labelled texts for directions. `planted` holds models whose
circuits are known, with prompts that show them.
"""

from mechinterp.tasks import planted
from mechinterp.tasks.agreement import agreement
from mechinterp.tasks.capitals import capitals
from mechinterp.tasks.concepts import CONCEPTS, Association, Concept, concepts, gender_association
from mechinterp.tasks.greater_than import greater_than
from mechinterp.tasks.histories import Histories, patient_histories
from mechinterp.tasks.induction import induction
from mechinterp.tasks.ioi import ioi
from mechinterp.tasks.sentences import sentences

__all__ = [
    "CONCEPTS",
    "Association",
    "Concept",
    "Histories",
    "agreement",
    "capitals",
    "concepts",
    "gender_association",
    "greater_than",
    "induction",
    "ioi",
    "patient_histories",
    "planted",
    "sentences",
]
