// Talks to the portal with OpenAI's SDK for Node.js, and prints what it was told as JSON. Needs its address and a key.

import OpenAI from "openai";

const [url, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const asked = { model: "smart", messages: [{ role: "user", content: "Hello" }] };
const tools = [
  { type: "function", function: { name: "go", parameters: { type: "object", properties: {} } } },
];

const whole = await client.chat.completions.create(asked);
let streamed = "";
let tokens = 0;
const stream = await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  tokens = chunk.usage?.total_tokens ?? tokens;
}
const calls = await client.chat.completions.stream({ ...asked, tools }).finalChatCompletion();

const headers = { "X-Session-Id": "node" };
await client.chat.completions.create(asked, { headers });
await client.chat.completions.create(asked, { headers });

const first = await client.responses.create({ model: "big", input: "One" });
const types = [];
const events = await client.responses.create({
  model: "big",
  input: "Two",
  previous_response_id: first.id,
  stream: true,
});
for await (const event of events) types.push(event.type);

let refused = "";
try {
  await client.chat.completions.create({ ...asked, temperature: 9 });
} catch (error) {
  refused = error instanceof OpenAI.BadRequestError ? error.param : String(error);
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const vectors = await client.embeddings.create({ model: "big", input: ["one"], encoding_format: "float" });

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    streamed,
    tokens,
    calls: calls.choices[0].message.tool_calls.map((call) => [call.function.name, call.function.arguments]),
    responses: [first.output_text, types.at(-1)],
    refused,
    models,
    vectors: vectors.data.map((item) => item.embedding),
  }),
);
