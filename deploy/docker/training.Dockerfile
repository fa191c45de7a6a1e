# The model room: `logicrd-train` with torch. Data, runs and the model repository are mounted.
#
#   docker build -f deploy/docker/training.Dockerfile -t logicrd-training .
#   docker run --gpus all --shm-size 2g -v ./data:/data:ro -v ./runs:/runs logicrd-training fit --data /data/tray --out /runs/tray
#
# Never built by a container engine here; `make images` runs these steps in a clean Debian 12 root.
ARG BASE=debian:bookworm-slim@sha256:d5d3f9c23164ea16f31852f95bd5959aad1c5e854332fe00f7b3a20fcc9f635c

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/logicrd
COPY requirements/training.txt requirements/build.txt requirements/
RUN python3 -m venv venv && python3 -m venv tools \
 && venv/bin/python -m pip install --no-deps --require-hashes -r requirements/training.txt \
 && tools/bin/python -m pip install --no-deps --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md source/
COPY pipeline source/pipeline
COPY training source/training
RUN tools/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./source \
 && venv/bin/python -m pip install --no-deps wheels/*.whl \
 && rm -rf venv/bin/logicrd

FROM ${BASE} AS training
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/logicrd --create-home logicrd
COPY --from=build /opt/logicrd/venv /opt/logicrd/venv
ENV PATH=/opt/logicrd/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="LogicRD training"
WORKDIR /var/lib/logicrd
USER 10001
ENTRYPOINT ["logicrd-train"]
CMD ["--help"]
