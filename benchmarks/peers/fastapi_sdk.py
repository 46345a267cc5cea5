"""What people write first over HTTP: FastAPI and the OpenAI SDK. It keeps nothing."""

import sys

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI

app = FastAPI()
client = AsyncOpenAI(base_url=f"http://127.0.0.1:{sys.argv[2]}/v1", api_key="none", max_retries=0)


@app.post("/v1/chat/completions", response_model=None)
async def completions(request: Request):
    body = await request.json()
    answer = await client.chat.completions.create(**body)
    if not body.get("stream"):
        return answer.model_dump()

    async def events():
        async for chunk in answer:
            yield f"data: {chunk.model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
