"""The commands of a terminal: `tightrope serve`, `chat`, `plan`, `perplexity` and `doctor`."""
