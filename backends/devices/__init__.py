"""Where a model may run: what cards this machine has, and whether they can be used."""
