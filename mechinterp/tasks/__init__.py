"""Prompt generators: behaviours that models are known for, with answers and named positions.

`planted` holds models whose circuits are known, with prompts that show them.
"""

from mechinterp.tasks import planted
from mechinterp.tasks.agreement import agreement
from mechinterp.tasks.capitals import capitals
from mechinterp.tasks.greater_than import greater_than
from mechinterp.tasks.histories import Histories, patient_histories
from mechinterp.tasks.induction import induction
from mechinterp.tasks.ioi import ioi

__all__ = ["Histories", "agreement", "capitals", "greater_than", "induction", "ioi", "patient_histories", "planted"]
