"""Prompt generators: behaviours that models are known for, with answers and named positions."""

from mechinterp.tasks.induction import induction
from mechinterp.tasks.ioi import ioi

__all__ = ["induction", "ioi"]
