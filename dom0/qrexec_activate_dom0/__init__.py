"""qvm-connect-route, a tool of dom0: routes for a qube, and the policy that
goes with them.

How a route is written, and what of it is refused, is in files of the package
qrexec_activate, to which there are links here: dom0 has neither trio nor click.
"""
