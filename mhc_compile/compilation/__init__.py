"""Turn one captured graph into a callable: analyze it, bind parameters, rewrite it, compile it."""
