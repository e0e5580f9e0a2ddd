# The coordinator: no torch, no weights, not root.  docker build -t hotweights .
ARG PYTHON=python:3.12-slim

FROM ${PYTHON} AS build
COPY . /src
RUN python3 -m venv /opt/hotweights && /opt/hotweights/bin/pip install --no-cache-dir "/src[coordinator]"

FROM ${PYTHON}
COPY --from=build /opt/hotweights /opt/hotweights
RUN ln -s /opt/hotweights/bin/hotweights /usr/local/bin/hotweights \
 && useradd --uid 10001 --create-home --home-dir /var/lib/hotweights hotweights
USER 10001
VOLUME /var/lib/hotweights
EXPOSE 5555
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
    CMD ["hotweights", "coord-health", "--endpoint", "tcp://127.0.0.1:5555"]
# --insecure: plaintext beyond loopback. Keep the port inside a trusted network.
CMD ["hotweights", "coord-serve", "--endpoint", "tcp://0.0.0.0:5555", "--insecure", \
     "--store", "sqlite:/var/lib/hotweights/coordinator.db"]
