"""Documents in any order through stock vLLM.

deployment  what one server serves: a checkpoint, a strategy, a store
index       which stored documents a prompt's token ids hold
plans       a strategy's plan as rows in slots, with holes between them
connector   vLLM's two ends: the scheduler's (finds documents, salts, reports) and the worker's
loading     the worker's part: reads rows, rotates keys, writes them into the paged cache
scheduler   holes as virtual requests that share the real request's blocks
endpoints   HTTP: `documents` in chat completions, /v1/documents
encoding    documents that are missing, encoded by a process in the background
launch      `kvilt vllm`: the right `vllm serve` line
checkup     `kvilt doctor --vllm`: why nothing is reused"""
