"""The models: detect a checkpoint, load it, own its weights, cache and tokenizer; token ids in, logits out."""
