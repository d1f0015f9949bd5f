"""Quantized formats of Hugging Face folders: each file names, checks and unpacks the tensors of one."""
