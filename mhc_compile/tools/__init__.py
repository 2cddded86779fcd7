"""The programs that the command line runs. The library never imports them."""
