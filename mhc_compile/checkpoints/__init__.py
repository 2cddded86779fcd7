"""Load state dicts into models with hyper-connections, or restore hyper-connections from them."""
