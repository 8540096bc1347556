"""Caddy: a browser in `work` reaches web apps of two other qubes by name, as a
look at its pictures shows."""

from __future__ import annotations

from recipe import Recipe, listening_ports, listens, require, until

BROWSER = (
    "chromium-headless-shell --no-sandbox --disable-gpu"
    " --disable-dev-shm-usage --window-size=800,400 "
    # A browser takes *.localhost for 127.0.0.1, which in here is another
    # address.
    "--host-resolver-rules='MAP *.localhost 127.0.0.1'"
    " --virtual-time-budget=10000 --timeout=30000"
)


def test_a_browser_sees_each_by_its_name() -> None:
    require(
        "caddy",
        "caddy",
        "chromium-headless-shell",
        "tesseract",
        "lighttpd",
        "/usr/share/gitweb/index.cgi",
    )
    with Recipe("caddy") as recipe:
        work = recipe["work"]
        recipe.follow("The web apps")
        recipe.follow("The names")
        until("Caddy listens", lambda: listens((work.host, 8080)))
        # Nothing else, such as a port by which programs change the routes.
        pid = work.run(
            "systemctl --user show --value -p MainPID caddy.service"
        ).strip()
        assert listening_ports(pid) == {(work.host, 8080)}
        for name, expected in {
            "gitweb": "project.git",
            "wiki": "All that I know",
        }.items():
            work.run(
                f"{BROWSER} --screenshot={name}.png"
                f" http://{name}.localhost:8080/"
            )
            seen = work.run(f"tesseract {name}.png - --psm 11")
            assert expected in " ".join(seen.split()), (
                f"the picture of {name} says {seen!r}"
            )
        calls = (work.machine.loopback / "calls").read_text()
        assert '"resolved": "gitweb"' in calls
        assert '"resolved": "wiki"' in calls
