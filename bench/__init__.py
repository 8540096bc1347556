"""What a connection costs, side by side with what one would use otherwise:
``python3 -m bench``.

Nothing here is part of the package; it measures the tree that it lies in.
"""
