"""Vectors and scores of texts, whatever the dialect."""
