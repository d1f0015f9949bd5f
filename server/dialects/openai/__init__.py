"""The OpenAI API under /v1: what it takes, how that becomes engine requests, and how answers are written."""
