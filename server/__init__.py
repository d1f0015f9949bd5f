"""The front: HTTP, validation, chat templates, streaming events, auth, metrics, command line."""
