"""Kvilt inside other systems: vllm/ serves documents in any order through stock vLLM."""
