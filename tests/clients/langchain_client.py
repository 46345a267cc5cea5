"""Talks to the portal with LangChain, and prints what it was told as JSON. Needs its address and a key."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

url, key = sys.argv[1:]
portal = {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0}


def go(x: int) -> str:
    """Goes."""
    return f"went {x}"


chat = ChatOpenAI(model="big", **portal)
whole = chat.invoke("Hello")
called = chat.bind_tools([go]).invoke("Hello")
streamed = None
for chunk in chat.bind_tools([go]).stream("Hello"):
    streamed = chunk if streamed is None else streamed + chunk
remembering = ChatOpenAI(model="big", default_headers={"X-Session-Id": "langchain"}, **portal)
for word in ("One", "Two"):
    remembering.invoke([("system", "Be brief."), ("user", word)])
stored = ChatOpenAI(model="big", use_responses_api=True, **portal)
first = stored.invoke("One")
second = stored.invoke("Two", previous_response_id=first.response_metadata["id"])
embedding = OpenAIEmbeddings(model="big", check_embedding_ctx_length=False, **portal)

print(
    json.dumps(
        {
            "whole": whole.content,
            "tokens": whole.usage_metadata["total_tokens"],
            "cached": whole.usage_metadata["input_token_details"]["cache_read"],
            "streamed": "".join(chunk.content for chunk in chat.stream("Hello")),
            "calls": [[call["name"], call["args"]] for call in [*called.tool_calls, *streamed.tool_calls]],
            "responses": [first.text, second.text],
            "vectors": embedding.embed_documents(["one", "three"]),
        }
    )
)
