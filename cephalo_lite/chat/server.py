"""`cephalo-serve` in a process of its own, beside the program that asks it, and ending with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from .serve import LOOPBACK, main


class Server:
    """A server that is up, on a free port of this machine.

    It ends with `stop`, with the `with` block, or with the process that started it, however that
    ends: the server reads from a pipe, and the pipe closes.

    Args:
        *options: of `transformers serve`, such as "--device", "cpu".
        log: file for what the server prints; by default one in the temporary folder.
        env: environment variables to change.
        seconds: how long to wait until it is up.

    Raises:
        RuntimeError: it ended, or was not up in time; with the last lines of the log.

    Example:
        >>> with Server("--device", "cpu") as server:  # doctest: +SKIP
        ...     client = openai.OpenAI(base_url=server.url, api_key="none")
    """

    def __init__(
        self,
        *options: str,
        log: str | Path | None = None,
        env: dict[str, str] | None = None,
        seconds: float = 300,
    ) -> None:
        """Start it and wait until it answers."""
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            port = free.getsockname()[1]
        self.address = f"http://{LOOPBACK}:{port}"
        self.url = f"{self.address}/v1"  # where OpenAI's clients look for it
        self.log = Path(log or Path(tempfile.mkdtemp(prefix="cephalo-serve-")) / "log")
        command = [sys.executable, "-m", __name__, "--port", str(port), *options]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + seconds
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                said = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"The server did not start. {self.log} ends with:\n{said}")
            time.sleep(0.2)

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self) -> int:
        """End it, and return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.process.stdin.close()

    def __enter__(self) -> Server:
        """Enter a block at whose end the server is stopped."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()


def _end_with_parent() -> None:
    """Wait until the pipe from the process that started this one closes, then end."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read, whose lock may outlive the interpreter
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
