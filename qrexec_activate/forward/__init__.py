"""serve: from a passed socket to qrexec-client-vm, and what runs in between.

Imports routing and systemd. Every byte of a connection passes here, and nowhere
else.
"""
