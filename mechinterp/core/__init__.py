"""The contracts: what analyzers, engine and model say to each other. Runs nothing."""
