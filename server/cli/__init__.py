"""The commands of a terminal: `tightrope serve`, `chat`, `plan`, `warm`, `perplexity` and `doctor`."""
