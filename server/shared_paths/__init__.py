"""Paths that several dialects share: the body tells which one is spoken."""
