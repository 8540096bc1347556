"""Ways from a local address to another qube, side by side in what they do.

`python -m compare` plays each scene of scenes.py on each way of ways.py, and
writes docs/compare.md. No figure is taken: bench/ does that.
"""
