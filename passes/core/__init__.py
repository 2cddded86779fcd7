"""What a pass is, and how graphs are copied and extended."""
