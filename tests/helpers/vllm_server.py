"""Stand-in for a vLLM server: it answers what TRL's client asks, with completions that depend on the prompt alone."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hf_context_parallel.verification.trainers.samples import VOCABULARY


class Handler(BaseHTTPRequestHandler):
    """Answers `/health`, `/v1/models`, `/server_info`, `/reset_prefix_cache` and `/v1/completions`."""

    def do_GET(self) -> None:
        settings = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self._answer({"data": [{"id": "model"}], "vllm_config": settings})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path != "/v1/completions":
            self._answer({"success": True})
            return
        asked = json.loads(content)
        self.server.prompts += [len(asked["prompt"])]
        self._answer({"choices": [choice(ids, n, asked) for ids in asked["prompt"] for n in range(asked["n"])]})

    def _answer(self, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def choice(prompt: list[int], number: int, asked: dict) -> dict:
    """Draw a completion of a prompt, from its tokens and its number."""
    draw = random.Random(f"{prompt} {number}")
    ids = [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(1, asked["max_tokens"]))]
    tokens = [f"token_id:{token}" for token in ids]
    logprobs = [-5.5 - 0.1 * draw.random() for _ in ids]
    tops = [{token: value} for token, value in zip(tokens, logprobs)]
    return {
        "prompt_token_ids": prompt,
        "token_ids": ids,
        "logprobs": {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops},
    }


@contextmanager
def serving() -> Iterator[ThreadingHTTPServer]:
    """Serve on a free port of the loopback address. `prompts` lists how many prompts each request had."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.prompts = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
