"""The families of the zoo, one module for each theme, and the layers that they are built from."""
