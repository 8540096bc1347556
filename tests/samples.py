"""Names and addresses to try, for the tests of what reads them and of what
writes them."""

from __future__ import annotations

from hypothesis import strategies as st

#: What UTF-8 can write.
REAL_TEXT = st.text(max_size=60)
QUBES = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,30}", fullmatch=True)
TARGETS = st.one_of(
    st.sampled_from(["@default", "@dispvm", "dom0"]),
    QUBES,
    QUBES.map("@dispvm:{}".format),
)

#: Addresses as a person writes them, and as systemd shows them.
SHOWN = [
    ("/run/é.sock", r"/run/\303\251.sock"),
    ("@a b", "@a b"),
    ("@é", r"@\303\251"),
    (r"/run/a\b", r"/run/a\\b"),
    ("127.0.0.1:80", "127.0.0.1:80"),
    ("vsock::80", "vsock::80"),
    # What is no name of a unix socket has no escapes.
    (r"no\\such", r"no\\such"),
]
