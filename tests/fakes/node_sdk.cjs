// OpenAI's own client for Node, as a program: it streams one chat and tells what it saw,
// a line of JSON for each thing.
//
//     NODE_PATH=… node node_sdk.cjs BASE_URL API_KEY TEXT

const OpenAI = require("openai");

const tell = (seen) => console.log(JSON.stringify(seen));

async function main(baseURL, apiKey, text) {
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
  const stream = await client.chat.completions.create({
    model: "tiny",
    messages: [{ role: "user", content: text }],
    stream: true,
  });
  tell({ begun: true });
  for await (const chunk of stream) {
    const content = chunk.choices[0].delta.content;
    if (content) tell({ content });
  }
  tell({ ended: true });
}

main(...process.argv.slice(2)).catch((error) =>
  tell({ name: error.constructor.name, message: error.message, code: error.code }),
);
