# The engine's image of deploy/kubernetes: vLLM with this package in it, which vLLM finds by itself.
ARG VLLM=vllm/vllm-openai:v0.32.0
FROM ${VLLM}
COPY . /src
# The light client: it asks for nothing that vLLM's own requirements do not allow.
RUN python3 -m pip install --no-cache-dir /src
