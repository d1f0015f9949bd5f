"""The commands of a terminal: `tightrope serve`, `chat`, `plan` and `perplexity`."""
