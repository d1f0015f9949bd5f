"""The models that are served: what there is, which of them are loaded, and who uses them."""
