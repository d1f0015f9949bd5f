"""Ollama's API under /api: the model, and generation of prompts and chats as lines of JSON."""
