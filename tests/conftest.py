"""What every test may use: a private machine with a real systemd user manager and a loopback qrexec."""
