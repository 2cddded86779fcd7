"""Find residual adds, give each a verdict, and link sites into chains."""
