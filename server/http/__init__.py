"""What stands before and behind every route: guards, bodies, errors, events, metrics."""
