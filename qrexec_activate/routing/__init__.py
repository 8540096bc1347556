"""What decides where bytes go: names, unit-file syntax, which file owns which
listener, routes and refusals.

Pure: no I/O. Imports nothing but the errors.
"""
