// Ollama's JavaScript package: texts, streams, a tool's result, a shape, what is there and what is loaded.
import { Ollama } from "ollama";
const tell = (what) => console.log(JSON.stringify(what));
const client = new Ollama({ host: process.env.URL });
const question = { role: "user", content: "Repeat after me: Hello, Mary!" };
const options = { temperature: 0, num_predict: 30 };
const model = (await client.list()).models[0].model;
tell({ listed: model, running: (await client.ps()).models[0].model });
tell({ text: (await client.chat({ model, messages: [question], options })).message.content });
let streamed = "";
for await (const piece of await client.chat({ model, messages: [question], options, stream: true })) {
  streamed += piece.message.content;
}
tell({ streamed });
const tide = {
  type: "function",
  function: { name: "tide", description: "Tells it.", parameters: { type: "object", properties: { port: { type: "string" } } } },
};
const turns = [
  { role: "user", content: "How is the tide in Hull?" },
  { role: "assistant", content: "", tool_calls: [{ function: { name: "tide", arguments: { port: "Hull" } } }] },
  { role: "tool", tool_name: "tide", content: "High at nine." },
];
const after = (await client.chat({ model, messages: turns, tools: [tide], options })).message;
tell({ after: Boolean(after.content || after.tool_calls) });
const schema = { type: "object", properties: { a: { enum: ["seven"] } }, required: ["a"], additionalProperties: false };
const shaped = await client.chat({ model, messages: [question], format: schema, options });
tell({ shape: JSON.parse(shaped.message.content) });
