"""The commands for people, a module each.

They edit only unit files, talk only to systemd, and keep no state of their own: what a person wrote by hand they
understand, and what they write a person could have written.
"""
