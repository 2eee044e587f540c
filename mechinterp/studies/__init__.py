"""Studies: functions above the engine, for what is not one round over examples."""

from mechinterp.studies.circuits import Circuit as Circuit
from mechinterp.studies.discovery import discover as discover
from mechinterp.studies.evaluation import completeness as completeness
from mechinterp.studies.evaluation import faithfulness as faithfulness
from mechinterp.studies.evaluation import faithfulness_curve as faithfulness_curve
from mechinterp.studies.evaluation import minimality as minimality
from mechinterp.studies.flow import Flow as Flow
from mechinterp.studies.flow import trace_information_flow as trace_information_flow

__all__ = [
    "Circuit",
    "Flow",
    "completeness",
    "discover",
    "faithfulness",
    "faithfulness_curve",
    "minimality",
    "trace_information_flow",
]
