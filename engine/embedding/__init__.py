"""The second engine: vectors of texts and scores against a query, in a process of its own beside the chat model's."""
