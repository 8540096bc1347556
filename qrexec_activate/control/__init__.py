"""The commands for people: one module per command, and what they share.

They edit only unit files, talk only to systemd, and keep no state of their own:
what a person wrote by hand they understand, and what they write a person could
have written. Imports routing, systemd, and of forward the words of outcomes.
"""
