"""Of qrexec_activate: routes as they are given in words."""
