# The coordinator: no torch, no weights, not root.  docker build -t hotweights .
# The same image runs a node's agent: docker run ... hotweights agent (deploy/kubernetes shows it).
#
# PYTHON is any image with python3 (3.10 or later) and its venv module: your own base, with your own certificates and
# pip configuration in it, if you build behind a mirror.
ARG PYTHON=python:3.12-slim

FROM ${PYTHON} AS build
COPY . /src
# pip stays behind: nothing is installed into a running container.
RUN python3 -m venv /opt/hotweights \
 && /opt/hotweights/bin/pip install --no-cache-dir "/src[coordinator]" \
 && /opt/hotweights/bin/pip uninstall --yes --quiet pip setuptools

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
