"""A guestbook: a web app that takes its socket from systemd, and keeps in
PostgreSQL who was there.

It knows no address, no user and no password: systemd passes the socket, and the
database has the Linux user's name.
"""

import http.server
import socket

import psycopg2


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with (
            self.server.database as transaction,
            transaction.cursor() as cursor,
        ):
            cursor.execute(
                "INSERT INTO visits (page) VALUES (%s)", (self.path,)
            )
            cursor.execute("SELECT count(*), current_user FROM visits")
            count, user = cursor.fetchone()
        text = f"{count} visits, noted by {user}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "somebody"  # unix sockets have no addresses to log


class Guestbook(http.server.HTTPServer):
    address_family = socket.AF_UNIX

    def __init__(self) -> None:
        super().__init__(("guestbook", 0), Page, bind_and_activate=False)
        self.socket = socket.socket(fileno=3)
        self.database = psycopg2.connect("")
        with self.database as transaction, transaction.cursor() as cursor:
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS visits (page text, at timestamptz"
                " DEFAULT now())"
            )


Guestbook().serve_forever()
