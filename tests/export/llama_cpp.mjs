// Greedy tokens and logits of a GGUF by llama.cpp, with keys and values in float32.
//
//   node llama_cpp.mjs LIBRARY MODEL ROWS.json NEW OUT.bin
//
// LIBRARY is node-llama-cpp's index.js. ROWS are lists of token ids. Standard output is, for every
// row, the NEW tokens that follow it; OUT gets float32 logits [tokens of all rows, vocabulary].
import fs from "node:fs";

const [library, modelPath, rowsPath, count, out] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(library);
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, maxThreads: 1, logLevel: LlamaLogLevel.error
});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const rows = JSON.parse(fs.readFileSync(rowsPath, "utf8"));
const longest = Math.max(...rows.map((row) => row.length)) + Number(count);
const CHUNK = 64;
const file = fs.openSync(out, "w");
const written = [];
for (const row of rows) {
    const context = await model.createContext({
        contextSize: Math.max(longest + 8, 64), batchSize: 512, threads: 1, flashAttention: false,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
    });
    const sequence = context.getSequence();
    let best = -1;
    const evaluate = async (tokens) => {
        const asked = tokens.map((token) => [token, {generateNext: {logits: true}}]);
        for (const {next} of await sequence.controlledEvaluate(asked)) {
            const logits = new Float32Array(next.logits.size);
            for (const [token, logit] of next.logits)
                logits[token] = logit;
            best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
            if (evaluating)
                fs.writeSync(file, logits);
        }
    };
    let evaluating = true;
    for (let start = 0; start < row.length; start += CHUNK)
        await evaluate(row.slice(start, start + CHUNK));
    evaluating = false;
    const tokens = [];
    while (tokens.length < Number(count)) {
        tokens.push(best);
        await evaluate([best]);
    }
    written.push(tokens);
    await context.dispose();
}
fs.closeSync(file);
console.log(JSON.stringify(written));
process.exit(0);
