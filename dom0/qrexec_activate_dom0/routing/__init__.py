"""Of qrexec_activate: what is a name, and what an address."""
