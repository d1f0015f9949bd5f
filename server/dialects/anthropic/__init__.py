"""Anthropic's Messages API under /v1/messages, and its counting of tokens."""
