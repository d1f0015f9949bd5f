"""Models that make one vector of a text, or score a text against a query, beside the model that writes."""
