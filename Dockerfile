# The coordinator: no torch, no weights, not root.  docker build -t hotweights .
ARG PYTHON=python:3.12-slim

FROM ${PYTHON} AS build
COPY . /src
RUN pip wheel --no-cache-dir --wheel-dir /wheels "/src[coordinator]"

FROM ${PYTHON}
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels "hotweights[coordinator]" \
 && useradd --system --uid 10001 --create-home --home-dir /var/lib/hotweights hotweights
USER 10001
VOLUME /var/lib/hotweights
EXPOSE 5555
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["hotweights", "coord-health", "--endpoint", "tcp://127.0.0.1:5555"]
# --insecure: plaintext beyond loopback. Keep the port inside a trusted network.
CMD ["hotweights", "coord-serve", "--endpoint", "tcp://0.0.0.0:5555", "--insecure", \
     "--store", "sqlite:/var/lib/hotweights/coordinator.db"]
