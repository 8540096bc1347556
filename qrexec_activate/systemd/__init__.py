"""What is asked of systemd, told to it and read from it: D-Bus, passed sockets,
the journal, unit folders, systemctl.

Decides nothing. Imports routing.
"""
