"""The guarantees of the state gateway."""
