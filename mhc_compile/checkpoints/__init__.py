"""Load state dicts into models that have hyper-connections, and restore hyper-connections from them."""
