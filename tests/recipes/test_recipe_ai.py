"""AI: an answer of a model in another qube arrives word by word, however long
the model thinks. A small HTTP server stands in for the model."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe import PATIENCE, Recipe, listens, require, until

#: llama-server as far as the page needs it: its options, and the two words of an
#: answer, between which it thinks for as long as a file is there.
MODEL = """#!/usr/bin/python3
import argparse, http.server, json, os, time

options = argparse.ArgumentParser()
options.add_argument("--host")
options.add_argument("--port", type=int)
options.add_argument("--model")
options = options.parse_args()
open(options.model).close()

class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and asked["stream"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in ("Hello", asked["messages"][-1]["content"]):
            delta = {"choices": [{"delta": {"content": word}}]}
            self.wfile.write(f"data: {json.dumps(delta)}\\n\\n".encode())
            while os.path.exists(options.model + ".thinking"):
                time.sleep(0.01)
        self.wfile.write(b"data: [DONE]\\n\\n")

    def log_message(self, *words):
        pass

server = http.server.ThreadingHTTPServer
server((options.host, options.port), Answer).serve_forever()
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Recipe]:
    require("ai", "curl")
    program = tmp_path / "llama-server"
    program.write_text(MODEL)
    program.chmod(0o755)
    with Recipe(
        "ai", substitutes={"/usr/bin/llama-server": str(program)}
    ) as recipe:
        yield recipe


def words(stream: str) -> list[str]:
    """The words that an answer holds so far."""
    return [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"][
            "content"
        ]
        for line in stream.splitlines()
        if line.startswith("data: {") and line.endswith("}")
    ]


def test_words_arrive_one_by_one(recipe: Recipe) -> None:
    models, work = recipe["models"], recipe["work"]
    model = models.machine.home / "models" / "model.gguf"
    model.parent.mkdir()
    model.touch()
    recipe.follow("The model")
    until("the model is loaded", lambda: listens((models.host, 11434)))
    said = recipe.follow("Ask it")
    (answer,) = (text for text in said.values() if text)
    assert words(answer) == ["Hello", "Say hello."]
    assert answer.endswith("data: [DONE]\n\n")
    assert work.environment["OPENAI_BASE_URL"] == work.local(
        "http://127.0.0.1:11434/v1"
    )

    thinking = Path(f"{model}.thinking")
    thinking.touch()
    question = json.dumps({"stream": True, "messages": [{"content": "Why?"}]})
    with socket.create_connection((work.host, 11434), PATIENCE) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.0\r\n"
            + f"Content-Length: {len(question)}\r\n\r\n{question}".encode()
        )
        got = ""
        while words(got) != ["Hello"]:
            got += client.recv(1 << 16).decode() or pytest.fail(got)
        thinking.unlink()
        while chunk := client.recv(1 << 16):
            got += chunk.decode()
    assert words(got) == ["Hello", "Why?"]
