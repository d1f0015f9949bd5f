// Vercel's AI SDK over both of its providers: texts, streams, objects, and a loop of tools.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false; // They would stand among what is told.
const tell = (what) => console.log(JSON.stringify(what));
const prompt = "Repeat after me: Hello, Mary!";
const openai = createOpenAI({ baseURL: `${process.env.URL}/v1`, apiKey: "none" });
const anthropic = createAnthropic({ baseURL: `${process.env.URL}/v1`, apiKey: "none" });
// A name that the SDK knows: it sends no temperature to models that it takes for newer ones.
const models = { responses: openai("gpt-x"), chat: openai.chat(process.env.MODEL ?? "tgi"), messages: anthropic("claude-3-haiku-20240307") };
const providerOptions = { openai: { store: false } };

for (const [name, model] of Object.entries(models)) {
  const shared = { model, maxOutputTokens: 30, temperature: 0, maxRetries: 0, providerOptions };
  const whole = await generateText({ ...shared, prompt });
  const stream = streamText({ ...shared, prompt });
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  let used = 0;
  const tide = tool({
    description: "Tells the tide of a port.",
    inputSchema: z.object({ port: z.enum(["Hull", "Rome"]) }),
    execute: async ({ port }) => ((used += 1), `High at nine in ${port}.`),
  });
  const loop = await generateText({
    ...shared,
    prompt: "How is the tide in Hull?",
    maxOutputTokens: 60,
    tools: { tide },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    stopWhen: stepCountIs(2),
  });
  const object = await generateText({
    ...shared,
    prompt: "A number, please.",
    output: Output.object({ schema: z.object({ a: z.enum(["seven"]) }) }),
  });
  tell({
    [name]: {
      text: whole.text, finish: whole.finishReason, streamed, used, steps: loop.steps.length, object: object.output,
      tokens: whole.usage.outputTokens,
    },
  });
}
