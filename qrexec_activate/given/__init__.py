"""Routes as they are given in words: KIND ARGUMENT TARGET and an address, by a
person to a command, or by dom0, whose words a systemd generator makes units of.

Quick to import, and free of the commands and of serve: a login waits for it.
"""
