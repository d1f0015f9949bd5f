"""Our modules in transformers' tree."""
