// Ask a running server from JavaScript: once, and exit by exit. Node 18 or newer:
//
//     impatient serve impatient-demo
//     node examples/serving/ask.mjs
//
// In a browser it works on pages of the server's own address; others may not ask it.

/** The body of a request for one sample of one array of numbers. */
function body(input, numbers, deadlineMs) {
  const { name, datatype, shape } = input;
  return JSON.stringify({
    parameters: { deadline_ms: deadlineMs },
    inputs: [{ name, datatype, shape: [1, ...shape.slice(1)], data: numbers }],
  });
}

async function checked(reply) {
  if (!reply.ok) throw new Error((await reply.json()).error);
  return reply;
}

/** What a model takes and gives. */
export async function metadata(address, model) {
  return (await checked(await fetch(`${address}/v2/models/${model}`))).json();
}

/** The best answer until the deadline: its output, and from which exit it is. */
export async function ask(address, model, numbers, deadlineMs) {
  const { inputs } = await metadata(address, model);
  const reply = await checked(await fetch(`${address}/v2/models/${model}/infer`, {
    method: "POST",
    body: body(inputs[0], numbers, deadlineMs),
  }));
  const { outputs, parameters } = await reply.json();
  return { output: outputs[0].data, ...parameters };
}

/** The answers of all exits as they come; the last one has `stopped_by`. */
export async function* everyExit(address, model, numbers, deadlineMs) {
  const { inputs } = await metadata(address, model);
  const reply = await checked(await fetch(`${address}/v2/models/${model}/stream`, {
    method: "POST",
    body: body(inputs[0], numbers, deadlineMs),
  }));
  let text = "";
  const decoder = new TextDecoder();
  const reader = reply.body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) yield JSON.parse(event.slice(event.indexOf("data: ") + 6));
  }
}

// as a program, not as a module of another
if (globalThis.process?.argv[1]?.endsWith("ask.mjs")) {
  const [address = "http://127.0.0.1:8000", model = "impatient-demo"] = process.argv.slice(2);
  const { inputs } = await metadata(address, model);
  const numbers = new Array(inputs[0].shape.slice(1).reduce((a, b) => a * b, 1)).fill(0.5);
  console.log(await ask(address, model, numbers, 50));
  for await (const answer of everyExit(address, model, numbers, 50))
    console.log(`exit ${answer.exit} after ${answer.elapsed_ms} ms`);
}
