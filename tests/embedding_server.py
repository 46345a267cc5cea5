"""llama.cpp that makes embeddings with the model at a path: `python embedding_server.py MODEL PORT`."""

from __future__ import annotations

import sys
import threading
from typing import Any


def main(model: str, port: str) -> None:
    """Serves until it is killed."""
    import xllamacpp

    params: Any = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"embedder"}
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.embedding, params.n_ctx, params.ui = True, 512, False
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
