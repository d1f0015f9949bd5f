"""A folder's vocabulary and tokenizer."""
