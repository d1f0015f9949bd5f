"""RoPE scaling: what a file says, which window it means, and the frequencies that come of it."""
