"""What runs a loaded model: steps, graphs, and caches beside the first."""
