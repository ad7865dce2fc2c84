# Three images from one lock file. The last is what you get without --target:
#   serve   the HTTP API and the demo, with one packaged model and nothing to train with
#   train   celestial run, retrain, monitor check, … and MLflow's server
#   lab     JupyterLab on the notebooks, with all of train
#
#   docker build -t celestial .
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only --tmpfs /tmp -e CELESTIAL_SERVE_OPEN_DEMO=true celestial
# Without the setting there is the API alone. Where others reach the port give the demo a login (celestial keys login).
# Another model:      --build-arg MODEL=output/guide, or a registered version: MODEL=.celestial/models/celestial/3
# The champion:       -v state:/state -e CELESTIAL_HOME=/state -e CELESTIAL_MODEL= follows the registry on that volume
# Podman, Buildah:    add --format docker to the build; their own format has no health check
# The same bytes:     --build-arg PYTHON_IMAGE=docker.io/library/python@sha256:… and no time in the image: Buildah's
#                     --timestamp 0, or BuildKit's --build-arg SOURCE_DATE_EPOCH=0 --output type=docker,rewrite-timestamp=true

# A tag, which gets Python's security fixes with each build; a digest is the very same each time.
ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim


# What builds, and stays behind. From 26.1 on pip takes versions and hashes out of a constraints file: so the one lock
# serves here too, and only what an image needs is installed from it.
FROM ${PYTHON_IMAGE} AS tools
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ONLY_BINARY=:all: PIP_REQUIRE_HASHES=1 \
    PIP_ROOT_USER_ACTION=ignore SOURCE_DATE_EPOCH=315532800
WORKDIR /src
RUN python -m venv /opt/tools && python -m venv --without-pip /opt/celestial \
 && echo 'pip==26.3 --hash=sha256:f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13' > pip.txt \
 && /opt/tools/bin/pip install -r pip.txt
COPY pyproject.toml requirements.lock ./
RUN /opt/tools/bin/pip install -c requirements.lock setuptools cyclonedx-bom
COPY deploy/gpu.lock deploy/requirements.py deploy/slim.py deploy/

# The package itself: built from what is here, so there is no hash to hold it to.
FROM tools AS wheel
COPY LICENSE README.md ./
COPY celestial_ml celestial_ml
RUN /opt/tools/bin/python -c 'from setuptools.build_meta import build_wheel; build_wheel("/src/dist")'


FROM tools AS serve-environment
ARG EXTRAS=postgres
RUN python deploy/requirements.py "${EXTRAS}" > wanted.txt \
 && /opt/tools/bin/pip --python /opt/celestial/bin/python install -c requirements.lock -r wanted.txt
COPY --from=wheel /src/dist dist
RUN PIP_REQUIRE_HASHES=0 /opt/tools/bin/pip --python /opt/celestial/bin/python install --no-deps dist/*.whl \
 && python deploy/slim.py /opt/celestial \
 && /opt/tools/bin/cyclonedx-py environment --output-reproducible -o /opt/celestial/bom.cdx.json /opt/celestial/bin/python


# A few packages have no wheel: they are built from a source that the lock names by its hash, by the lock's setuptools.
FROM tools AS train-environment
ARG EXTRAS=train,postgres,s3,sign
RUN python deploy/requirements.py "${EXTRAS}" > wanted.txt \
 && /opt/tools/bin/pip --python /opt/celestial/bin/python install -c requirements.lock setuptools \
 && /opt/tools/bin/pip --python /opt/celestial/bin/python install --only-binary=:none: --no-build-isolation -c requirements.lock -c deploy/gpu.lock -r wanted.txt
COPY --from=wheel /src/dist dist
RUN PIP_REQUIRE_HASHES=0 /opt/tools/bin/pip --python /opt/celestial/bin/python install --no-deps dist/*.whl \
 && /opt/celestial/bin/python -m compileall -q -j 0 -x /ploomber/resources/ --invalidation-mode unchecked-hash /opt/celestial \
 && /opt/tools/bin/cyclonedx-py environment --output-reproducible -o /opt/celestial/bom.cdx.json /opt/celestial/bin/python


FROM train-environment AS lab-environment
RUN /opt/tools/bin/pip --python /opt/celestial/bin/python install --only-binary=:none: --no-build-isolation -c requirements.lock jupyterlab nbdev nbdime \
 && /opt/celestial/bin/python -m compileall -q -j 0 -x /ploomber/resources/ --invalidation-mode unchecked-hash /opt/celestial \
 && /opt/tools/bin/cyclonedx-py environment --output-reproducible -o /opt/celestial/bom.cdx.json /opt/celestial/bin/python


# What all three are: somebody without rights, and a place for state. Everything else is read-only, but for /tmp.
FROM ${PYTHON_IMAGE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.source="https://github.com/celestial-ml/celestial_ml" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/celestial/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    GRADIO_ANALYTICS_ENABLED=False
# Not useradd: it writes today's date.
RUN echo 'celestial:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'celestial:x:10001:' >> /etc/group \
 && install -d -o 10001 -g 10001 /state /artifacts /project /project/output /project/data


# The notebooks, which are the pipeline's steps.
FROM base AS project
ARG REVISION=unknown
ENV CELESTIAL_HOME=/state \
    CELESTIAL_REVISION=${REVISION} \
    MPLCONFIGDIR=/tmp/matplotlib \
    PLOOMBER_STATS_ENABLED=false
WORKDIR /project
COPY --chown=10001:10001 dvc.yaml pipeline*.yaml pyproject.toml ./
COPY --chown=10001:10001 params params
COPY --chown=10001:10001 nbs nbs
COPY --chown=10001:10001 data/raw.dvc data/


FROM project AS train
LABEL org.opencontainers.image.title="celestial-train" \
      org.opencontainers.image.description="The pipeline of celestial_ml: train, evaluate, register, retrain, monitor"
COPY --from=train-environment /opt/celestial /opt/celestial
USER 10001:10001
CMD ["celestial", "run"]


FROM project AS lab
LABEL org.opencontainers.image.title="celestial-lab" \
      org.opencontainers.image.description="JupyterLab on the notebooks of celestial_ml"
COPY --from=lab-environment /opt/celestial /opt/celestial
USER 10001:10001
EXPOSE 8888
CMD ["python", "-m", "celestial_ml.workbench.lab", "--ip=0.0.0.0", "--no-browser"]


FROM base AS serve
LABEL org.opencontainers.image.title="celestial" \
      org.opencontainers.image.description="Which world is this? The demo and the HTTP API of celestial_ml"
ENV CELESTIAL_HOME=/tmp/celestial \
    CELESTIAL_MODEL=/model
COPY --from=serve-environment /opt/celestial /opt/celestial
# A base image may come without compiled modules of Python's own, and a start would compile them each time.
# ONNX Runtime leaves an identity of the machine in /tmp: not into the image, which would never be the same twice.
RUN PYTHONDONTWRITEBYTECODE="" python -c 'import celestial_ml.cli.app, celestial_ml.monitor.log, celestial_ml.reports.health, celestial_ml.serve.api, uvicorn' \
 && rm -rf /tmp/.cache /tmp/.ses

# Last, because it changes most often. Of a run, .dockerignore lets only the packaged model pass.
ARG MODEL=output/default
COPY ${MODEL} /model

# By number, so that an orchestrator can see that it isn't root.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["celestial", "serve", "--host", "0.0.0.0"]
