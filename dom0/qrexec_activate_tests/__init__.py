"""Integration tests for Qubes OS: a qube that connects, and two that serve.

dom0's test runner finds them by the entry point
`qubes.tests.extra.for_template` and runs them once for each template. All is
done by shell scripts in the qubes, with what `qubes.tests.extra` promises to
such tests and nothing else, so that a pretend dom0 will do as well.
"""

from __future__ import annotations

import qubes.tests.extra

PRELUDE = "export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}\n"
SERVICES = "/etc/qubes-rpc"
#: Says something to an address and listens. socat would take a reset for an
#: end.
PROBE = """\
python3 - {} <<'END'
import socket, sys
path, port = sys.argv[1:]
kind = socket.AF_INET if int(port) else socket.AF_UNIX
client = socket.socket(kind)
client.connect((path, int(port)) if int(port) else path)
try:
    client.sendall(b"anybody?")
    client.shutdown(socket.SHUT_WR)
    answer = client.recv(100)
except OSError:
    print("reset")
else:
    print("answered", answer)
END
"""


class TC_00_Routes(qubes.tests.extra.ExtraTestCase):
    #: The port in the serving qubes, and in the one that connects.
    port = 1234
    #: What bounds a script: seconds, far more than it needs.
    patience = 300

    def setUp(self) -> None:
        super().setUp()
        self.client, self.work, self.gitweb = self.create_vms(
            ["client", "work", "gitweb"]
        )
        for qube in (self.client, self.work, self.gitweb):
            qube.start()
            # The user's systemd comes with the session.
            qube.run("true", gui=True, wait=True)
        has_command = "command -v qrexec-activate && command -v socat"
        if self.client.run(has_command, wait=True) != 0:
            self.skipTest("the template has no qrexec-activate, or no socat")

    def needs_service(self, name: str) -> None:
        if self.work.run(f"test -x {SERVICES}/{name}", wait=True) != 0:
            self.skipTest("the template has no qrexec-activate-services")

    # What happens in a qube

    def script(self, qube, text: str) -> str:
        """Run a script as the user of a qube, and return what it prints."""
        process = qube.run(
            f"timeout {self.patience} sh -eu -s",
            passio_popen=True,
            passio_stderr=True,
        )
        stdout, stderr = process.communicate((PRELUDE + text).encode())
        problem = f"in {qube.name}:\n{text}\n{stderr.decode()}"
        self.assertEqual(process.returncode, 0, problem)
        return stdout.decode()

    def serve(self, qube, listen: str, connect: str, does: str) -> None:
        """Let a command of the shell answer each connection in a qube."""
        self.script(
            qube,
            f"setsid -f timeout {self.patience * 2} socat -t {self.patience} "
            f"{listen},fork SYSTEM:'{does}' </dev/null >/dev/null 2>&1\n"
            f"until socat -u OPEN:/dev/null {connect} 2>/dev/null\n"
            "do sleep 0.2; done\n",
        )

    def serve_tcp(self, qube, does: str) -> None:
        """Serve at the port of qubes.ConnectTCP."""
        self.serve(
            qube,
            f"TCP4-LISTEN:{self.port},bind=127.0.0.1,reuseaddr",
            f"TCP4:127.0.0.1:{self.port}",
            does,
        )

    def says_its_name(self, qube) -> str:
        return f"cat >/dev/null; echo {qube.name}"

    def routes(self, **targets) -> None:
        """Write a drop-in for each target, as a person does, with an address of
        its own, 127.0.0.1 and so on; and start their unit."""
        unit = f"qrexec-connect-tcp@{self.port}.socket"
        lines = [f"folder=$HOME/.config/systemd/user/{unit}.d"]
        lines.append('mkdir -p "$folder"')
        for number, (name, qube) in enumerate(targets.items(), 1):
            lines.append(
                f"printf '%s\\n' '[Socket]'"
                f" ListenStream=127.0.0.{number}:{self.port}"
                f' FileDescriptorName={qube.name} >"$folder/{name}.conf"'
            )
        lines.append("systemctl --user daemon-reload")
        lines.append(f"systemctl --user enable --now {unit}")
        self.script(self.client, "\n".join(lines))

    def address(self, number: int = 1) -> str:
        return f"TCP4:127.0.0.{number}:{self.port}"

    def ask(self, address: str) -> str:
        """What comes back, after the client has said that it sends no more."""
        return self.script(
            self.client, f"socat -t {self.patience} - {address} </dev/null"
        ).strip()

    def assert_reset(self, path: str, port: int = 0) -> None:
        """A connection is taken and reset: that does not look like an empty
        answer."""
        said = self.script(self.client, PROBE.format(f'"{path}" {port}'))
        self.assertEqual(said.strip(), "reset")

    def allow(self, service: str, qube) -> None:
        self.qrexec_policy(service, self.client.name, qube.name)

    # What is promised

    def test_000_two_drop_ins_reach_two_qubes(self) -> None:
        for qube in (self.work, self.gitweb):
            self.allow("qubes.ConnectTCP", qube)
            self.serve_tcp(qube, self.says_its_name(qube))
        self.routes(gitweb=self.gitweb, work=self.work)
        self.assertEqual(self.ask(self.address(1)), self.gitweb.name)
        self.assertEqual(self.ask(self.address(2)), self.work.name)
        self.assertEqual(self.ask(self.address(1)), self.gitweb.name)

    def test_010_open_connections_outlive_a_stop_and_a_kill(self) -> None:
        self.allow("qubes.ConnectTCP", self.work)
        self.serve_tcp(self.work, "cat")
        self.routes(work=self.work)
        answer = self.script(
            self.client,
            f"""
            daemon=qrexec-connect-tcp.service
            folder=$(mktemp -d)
            mkfifo "$folder/in"
            socat - {self.address()} <"$folder/in" >"$folder/out" &
            client=$!
            exec 3>"$folder/in"
            say() {{
                echo "$1" >&3
                until grep -qx "$1" "$folder/out"; do
                    kill -0 "$client"
                    sleep 0.1
                done
            }}
            say first
            systemctl --user stop "$daemon"
            say stopped
            echo | socat -t {self.patience} - {self.address()} >/dev/null
            pid=$(systemctl --user show --value -p MainPID "$daemon")
            test "$pid" -gt 1
            kill -KILL "$pid"
            say killed
            echo another | socat -t {self.patience} - {self.address()}
            exec 3>&-
            wait
            cat "$folder/out"
            rm -r "$folder"
            """,
        )
        self.assertEqual(
            answer.split(), ["another", "first", "stopped", "killed"]
        )

    def test_020_what_policy_does_not_allow_is_reset(self) -> None:
        for qube in (self.work, self.gitweb):
            self.serve_tcp(qube, self.says_its_name(qube))
        self.qrexec_policy(
            "qubes.ConnectTCP", self.client.name, self.work.name, allow=False
        )
        # The other one is not named at all.
        self.routes(gitweb=self.gitweb, work=self.work)
        self.assert_reset("127.0.0.1", self.port)
        self.assert_reset("127.0.0.2", self.port)
        self.allow("qubes.ConnectTCP", self.gitweb)
        self.assertEqual(self.ask(self.address(1)), self.gitweb.name)

    def test_030_connect_unix(self) -> None:
        self.needs_service("qubes.ConnectUnix")
        folder = "$XDG_RUNTIME_DIR/qubes.ConnectUnix"
        self.script(self.work, f'mkdir -p -m 0700 "{folder}"')
        self.serve(
            self.work,
            f"UNIX-LISTEN:{folder}/test",
            f"UNIX-CONNECT:{folder}/test",
            self.says_its_name(self.work),
        )
        self.script(
            self.client, f"qrexec-activate add unix test {self.work.name}"
        )
        path = "$XDG_RUNTIME_DIR/qrexec/test"
        # By the policy that comes with this package.
        self.assert_reset(path)
        self.allow("qubes.ConnectUnix", self.work)
        self.assertEqual(self.ask(f"UNIX-CONNECT:{path}"), self.work.name)

    def test_040_connect_tcp_bind(self) -> None:
        self.needs_service("qubes.ConnectTCPBind")
        port = self.port + 1
        self.serve(
            self.work,
            f"TCP4-LISTEN:{port},reuseaddr",
            f"TCP4:127.0.0.1:{port}",
            "cat >/dev/null; echo $SOCAT_PEERADDR",
        )
        self.script(
            self.client,
            f"qrexec-activate add tcp-bind {port}-127.0.1.1 {self.work.name}"
            f" --listen 127.0.0.1:{self.port}",
        )
        # By the policy that comes with this package.
        self.assert_reset("127.0.0.1", self.port)
        self.allow("qubes.ConnectTCPBind", self.work)
        self.assertEqual(self.ask(self.address()), "127.0.1.1")


def list_tests() -> tuple[type, ...]:
    return (TC_00_Routes,)
