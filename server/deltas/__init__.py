"""An answer's deltas on their way out: several streams as one, cut token by token, aborted, or collected."""
