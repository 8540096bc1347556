"""What genuine qrexec-client-vm does, as a table of probes that any
qrexec-client-vm can be held against.

rows.py is the table, and data alone; probes.py runs a row's two sides; place.py
says where the services of a target, its policy and its faults are.
"""
