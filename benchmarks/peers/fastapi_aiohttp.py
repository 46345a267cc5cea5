"""The least that a bridge can do over HTTP: FastAPI and aiohttp, bytes passed on. It keeps nothing."""

import sys
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

UPSTREAM = f"http://127.0.0.1:{sys.argv[2]}/v1/chat/completions"


@asynccontextmanager
async def lifespan(app: FastAPI):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        app.state.session = session
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions", response_model=None)
async def completions(request: Request):
    body = await request.body()
    answer = await app.state.session.post(UPSTREAM, data=body, headers={"Content-Type": "application/json"})
    if "event-stream" not in answer.headers["Content-Type"]:
        return Response(await answer.read(), media_type="application/json")
    return StreamingResponse(answer.content.iter_any(), media_type="text/event-stream")


uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
