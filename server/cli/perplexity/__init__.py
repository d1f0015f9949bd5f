"""`tightrope perplexity`: the command, what it found, and its picture."""
