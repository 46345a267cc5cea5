"""Serves a GGUF model with llama.cpp's own HTTP server: `python -m app.cli.llm_server --help`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import psutil

from app.cli.gguf import NotGguf, trained_context

CACHE_MOST_MIB = 8192
QUANTISATION = re.compile(r"[.-](I?Q\d\w*|F16|F32|BF16)$", re.IGNORECASE)


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGINT):
        # At once, in the middle of loading or of a generation: nothing here is worth waiting for.
        signal.signal(number, signal.SIG_DFL)
    try:
        trained = trained_context(arguments.model)
    except (NotGguf, OSError) as error:
        _fail(str(error))
    if arguments.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    # llama.cpp allots the memory for what is asked, and only then finds it too much for the model.
    context = min(arguments.ctx, trained or arguments.ctx)
    _check_port(arguments.host, arguments.port)
    server = _serve(arguments, context)
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


def _end_with_parent() -> None:
    """Ends this process with the one that holds the other end of its input, however that one ends."""
    sys.stdin.buffer.read()
    os._exit(0)


def cores() -> int:
    """How many cores this process may use."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable)


def alias_of(model: Path) -> str:
    """The public name of a model file: its stem, without the kind of quantisation."""
    return QUANTISATION.sub("", model.stem).lower()


def _serve(arguments: argparse.Namespace, context: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(arguments.model)
    # Without a name of its own the server would tell clients the path of the file.
    params.model_alias = {arguments.alias or alias_of(arguments.model)}
    params.hostnames = [arguments.host]
    params.port = arguments.port
    params.n_parallel = arguments.slots
    if arguments.threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    else:
        params.cpuparams.n_threads = max(1, cores() - 1)
    params.n_ctx = arguments.slots * context  # shared out evenly
    params.use_jinja = True
    params.cont_batching = True
    params.cache_prompt = True
    params.cache_ram_mib = min(CACHE_MOST_MIB, psutil.virtual_memory().total // 2**20 // 4)
    params.endpoint_slots = True
    params.endpoint_props = True
    params.endpoint_metrics = True
    params.ui = False
    params.cors_origins = "localhost"  # not any page that a browser on this machine shows
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        _fail(f"llama.cpp could not serve {arguments.model.name}: {error}")


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            _fail(f"Port {port} on {host} cannot be used: {error.strerror}.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves a GGUF model with llama.cpp.")
    parser.add_argument("--model", type=_existing, required=True, help="the GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="generations at once (%(default)s)")
    parser.add_argument("--ctx", type=int, default=4096, help="context of each, in tokens (%(default)s)")
    # llama.cpp's threads wait for one another without sleeping: where other programs need the cores too, each
    # thread more makes it slower. So one core is left to them while it generates.
    parser.add_argument("--threads", type=int, help="threads of a generation (one fewer than cores)")
    parser.add_argument("--alias", default="", help="the model's public name (from the file's name)")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    return parser.parse_args()


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
