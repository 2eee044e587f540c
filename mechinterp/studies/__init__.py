"""Studies: functions above the engine, for what is not one round over examples."""

from mechinterp.studies.circuits import Circuit as Circuit
from mechinterp.studies.flow import Flow as Flow
from mechinterp.studies.flow import trace_information_flow as trace_information_flow

__all__ = ["Circuit", "Flow", "trace_information_flow"]
