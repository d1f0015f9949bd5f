"""What clients of other servers expect: thin aliases over the same engine calls, one file a family.

Clients of vLLM, Aphrodite, Hugging Face and OpenAI need no file here: /v1, /info and /tokenize serve them as they are.
"""
