"""vLLM and torch: the only importers of both.

What an engine or a worker imports first (`vllm_auto`, `vllm_extension`, `vllm_worker`, `vllm_engine`)
is light and imports the rest inside functions.
"""
