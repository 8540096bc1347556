"""A qrexec for one machine: a stand-in for dom0 and for every other qube.

The demo and the tests call its `qrexec-client-vm` where there is no Qubes. It
follows what the real one shows its caller: options, names, policy, exit codes,
messages, and when bytes begin to flow. Nothing here is meant for a machine with
qrexec.
"""
