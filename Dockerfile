# The demo and the HTTP API in one small image: the serving dependencies, one packaged model, nothing to train with.
#   docker build -t celestial .
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only --tmpfs /tmp -e CELESTIAL_SERVE_OPEN_DEMO=true celestial
# Without the setting there is the API alone. Where others reach the port give the demo a login (celestial keys login).
# Another run's model:   docker build --build-arg MODEL=output/guide -t celestial .
# Podman and Buildah:    add --format docker to the build; their own format has no health check.

# A tag, which gets Python's security fixes with each build. For the very same bytes each time pin the digest:
# --build-arg PYTHON_IMAGE=docker.io/library/python@sha256:…
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim


FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_REQUIRE_HASHES=1
WORKDIR /src

# /opt/tools builds and stays behind; /opt/celestial is what the image gets. From 26.1 on pip takes versions and hashes
# out of a constraints file: so the one lock file serves here too, and only what serving needs is installed from it.
RUN python -m venv /opt/tools && python -m venv --without-pip /opt/celestial \
 && echo 'pip==26.3 --hash=sha256:f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13' > pip.txt \
 && /opt/tools/bin/pip install -r pip.txt

COPY pyproject.toml requirements.lock ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > serve.txt \
 && /opt/tools/bin/pip install -c requirements.lock setuptools \
 && /opt/tools/bin/pip --python /opt/celestial/bin/python install -c requirements.lock -r serve.txt

# The package itself: built from what is here, so there is no hash to hold it to.
COPY LICENSE README.md ./
COPY celestial_ml celestial_ml
RUN /opt/tools/bin/python -c 'from setuptools.build_meta import build_wheel; build_wheel("/src/dist")' \
 && PIP_REQUIRE_HASHES=0 /opt/tools/bin/pip --python /opt/celestial/bin/python install --no-deps dist/*.whl


FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="celestial" \
      org.opencontainers.image.description="Which world is this? The demo and the HTTP API of celestial_ml" \
      org.opencontainers.image.source="https://github.com/celestial-ml/celestial_ml" \
      org.opencontainers.image.licenses="Apache-2.0"

# /tmp is the only place that is written to.
ENV PATH=/opt/celestial/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    CELESTIAL_HOME=/tmp/celestial \
    CELESTIAL_MODEL=/model \
    GRADIO_ANALYTICS_ENABLED=False

RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin celestial
COPY --from=build /opt/celestial /opt/celestial

# Last, because it changes most often. Of a run, .dockerignore lets only the packaged model pass.
ARG MODEL=output/default
COPY ${MODEL} /model

# By number, so that an orchestrator can see that it isn't root.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["celestial", "serve", "--host", "0.0.0.0"]
