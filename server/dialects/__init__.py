"""What clients of each server expect: a dialect is one reader and two writers, see `Dialect` in server/answering.py.

One file or folder a family, and none imports another. Clients of vLLM, Aphrodite and Hugging Face need none of their
own: /v1, /info and /tokenize serve them as they are.
"""
