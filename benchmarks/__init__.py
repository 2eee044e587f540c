"""What mechinterp costs, beside a floor and beside its peers. Run one with ``python -m benchmarks.NAME``."""
