"""From a folder to a model: the module tree, which tensor goes where, and the weights."""
