// OpenAI's JavaScript package: chats and responses, whole and streamed, with tools.
import OpenAI from "openai";
const client = new OpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: "none", maxRetries: 0 });
const tell = (what) => console.log(JSON.stringify(what));
const question = "Repeat after me: Hello, Mary!";
const tide = {
  type: "function",
  name: "tide",
  strict: true,
  parameters: {
    type: "object",
    properties: { port: { type: "string", enum: ["Hull", "Rome"] } },
    required: ["port"],
    additionalProperties: false,
  },
};

const response = await client.responses.create({ model: "gpt-x", input: question, max_output_tokens: 30, temperature: 0 });
tell({ text: response.output_text, status: response.status });

const stream = client.responses.stream({ model: "gpt-x", input: question, max_output_tokens: 30, temperature: 0 });
let streamed = "";
stream.on("response.output_text.delta", (event) => (streamed += event.delta));
tell({ final: (await stream.finalResponse()).output_text, streamed });

const ask = [{ role: "user", content: "How is the tide in Hull?" }];
const use = await client.responses.create({
  model: "gpt-x", input: ask, tools: [tide], tool_choice: "required", parallel_tool_calls: false, temperature: 0,
});
const call = use.output.find((item) => item.type === "function_call");
tell({ tool: call.name, input: JSON.parse(call.arguments) });
const after = await client.responses.create({
  model: "gpt-x", store: false, max_output_tokens: 20, tools: [tide],
  input: [...ask, ...use.output, { type: "function_call_output", call_id: call.call_id, output: "High at nine." }],
});
tell({ after: after.output.map((item) => item.type) });

const chat = await client.chat.completions.create({
  model: "", messages: [{ role: "user", content: question }], max_completion_tokens: 30, temperature: 0,
});
tell({ chat: chat.choices[0].message.content });
try {
  await client.responses.create({ model: "gpt-x", input: "a", previous_response_id: "resp_1" });
} catch (error) {
  tell({ error: error.message, status_of_error: error.status });
}
