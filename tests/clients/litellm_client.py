"""Talks to the portal with LiteLLM, and prints what it was told as JSON. Needs its address and a key."""

import json
import sys

import litellm

url, key = sys.argv[1:]
portal = {"api_base": f"{url}/v1", "api_key": key, "num_retries": 0}
asked = {"model": "openai/big", "messages": [{"role": "user", "content": "Hello"}], **portal}
tool = {
    "type": "function",
    "function": {"name": "go", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}

whole = litellm.completion(**asked)
chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
calls = litellm.completion(**asked, tools=[tool]).choices[0]
streamed = litellm.stream_chunk_builder(list(litellm.completion(**asked, tools=[tool], stream=True))).choices[
    0
]
for _ in range(2):
    litellm.completion(**asked, extra_headers={"X-Session-Id": "litellm"})
try:
    litellm.completion(**{**asked, "model": "openai/gpt-9"})
    refused = ""
except litellm.exceptions.NotFoundError as error:
    refused = error.message
try:
    litellm.completion(**{**asked, "api_key": "wrong"})
    kept_out = False
except litellm.exceptions.AuthenticationError:
    kept_out = True
vectors = litellm.embedding(model="openai/big", input=["one", "three"], encoding_format="float", **portal)
response = litellm.responses(model="openai/big", input="Hello", **portal)

print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "thoughts": whole.choices[0].message.reasoning_content,
            "tokens": whole.usage.total_tokens,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "streamed_tokens": chunks[-1].usage.total_tokens,
            "reasons": [calls.finish_reason, streamed.finish_reason],
            "calls": [
                [call.function.name, call.function.arguments]
                for choice in (calls, streamed)
                for call in choice.message.tool_calls
            ],
            "refused": refused,
            "kept_out": kept_out,
            "vectors": [item["embedding"] for item in vectors.data],
            "response": response.output_text,
        }
    )
)
