"""`mhc demo`: train one small transformer twice, plain and with hyper-connections.

settings -> data -> train -> report; `session` runs them, with a checkpoint and Ctrl-C.
"""
