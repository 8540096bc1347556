"""One of many programs with a user and a database each: a small web server on
systemd's socket, which tells who it is, and of what it is asked to try, what is
open to it."""

import http.server
import json
import os
import pwd
import socket
import sys

import psycopg2

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from hostile import is_open


def is_open_to_us(way: str) -> bool:
    kind, _, what = way.partition(" ")
    if kind == "database":
        try:
            psycopg2.connect(dbname=what).close()
        except psycopg2.Error:
            return False
        return True
    try:
        if kind == "home":
            with open(f"{what}/file", "a", encoding="utf-8"):
                return True
        if kind == "process":
            os.kill(int(what), 0)
            return True
    except OSError:
        return False
    return is_open(way)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with psycopg2.connect("") as database, database.cursor() as cursor:
            cursor.execute("select current_user, current_database()")
            self.answer([*cursor.fetchone(), pwd.getpwuid(os.getuid())[0]])

    def do_POST(self) -> None:
        ways = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer([way for way in ways if is_open_to_us(way)])

    def answer(self, said: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def address_string(self) -> str:
        return "a socket"


class Server(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket(fileno=3)


if __name__ == "__main__":
    Server().serve_forever()
