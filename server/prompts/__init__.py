"""Chats as text: a model's own template, a built-in format, and the marks that they write."""
