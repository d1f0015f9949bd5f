"""OpenAI's Responses API under /v1/responses, without a memory: each request brings its whole conversation."""
