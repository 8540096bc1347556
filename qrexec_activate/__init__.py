"""Systemd-socket-activated qrexec calls."""
