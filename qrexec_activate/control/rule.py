"""The line of dom0's policy that lets the connections of a route through. No
I/O."""

from __future__ import annotations

__all__ = ["TARGET_QUBE", "policy_line"]

#: What stands for the qube that dom0 is to choose, where nobody has named it;
#: the reader must. No qube can have this name.
TARGET_QUBE = "TARGET-QUBE"


def policy_line(
    service: str,
    argument: str,
    source: str,
    target: str,
    action: str = "ask",
    redirect: str | None = None,
) -> list[str]:
    """One rule of the 5.0 format, in its columns.

    An explicit target never matches a line for @default, so the line names what
    the call names. For @default, dom0 chooses the qube: `target=` where the
    call is allowed, `default_target=` where a person is asked.
    """
    words = [
        service,
        f"+{argument}",
        source,
        "@adminvm" if target == "dom0" else target,
        action,
    ]
    if target == "@default":
        if action == "allow":
            words.append(f"target={redirect or TARGET_QUBE}")
        elif redirect:
            words.append(f"default_target={redirect}")
    elif (
        action == "ask"
        and target != "@dispvm"
        and not target.startswith("@dispvm:")
    ):
        words.append(f"default_target={words[3]}")
    return words
