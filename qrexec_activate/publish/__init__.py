"""The service side: what other qubes can reach in this one, and programs on
demand.

Imports all but loopback, and nothing imports it: it is a package of its own,
for the qubes where it is used.
"""
