"""Logits to tokens: an ordered chain of pure functions over [B, V] float32 logits."""
