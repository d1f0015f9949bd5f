"""The two sides of the process border: the client with its supervisor, and the engine process."""
