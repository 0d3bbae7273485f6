"""What others speak to the engine: one package per protocol."""
