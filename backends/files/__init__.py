"""A model's files, read without trust: JSON, safetensors, adapters."""
