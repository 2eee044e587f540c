"""One file per family of methods. They know the contract (core) and models, never the engine."""
