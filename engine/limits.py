"""Bounds of what one request may ask for: the front refuses what is beyond them, and the engine counts on them."""

MAX_BANNED_STRINGS = 1024
MAX_BANNED_CHARS = 256  # A banned string is at most this long, so no more text is ever held back.
MAX_BREAKER_BYTES = 64  # A sequence breaker is at most this long, so no text further back matters to a token.
