# The line (target `worker`, the default), the same with GigE Vision and USB3 Vision cameras (`worker-genicam`), and the
# simulated camera of compose.yaml (`camera`). No torch, no compiler, no pip in what runs. Models are mounted, never in
# the image.
#
#   docker build -f deploy/docker/worker.Dockerfile -t logicrd-worker .
#   docker run -v ./line:/line:ro logicrd-worker run -c /line/line.yaml
#
# Never built by a container engine here: `make images` runs these very steps in a clean Debian 12 root instead. The
# base is pinned by digest; take a newer one with --build-arg BASE=...
ARG BASE=debian:bookworm-slim@sha256:d5d3f9c23164ea16f31852f95bd5959aad1c5e854332fe00f7b3a20fcc9f635c

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
RUN apt-get update \
 && apt-get install --yes --no-install-recommends binutils python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/logicrd
COPY deploy/docker/slim.py ./
COPY requirements/pipeline.txt requirements/build.txt requirements/
RUN python3 -m venv venv && python3 -m venv tools \
 && venv/bin/python -m pip install --no-deps --require-hashes -r requirements/pipeline.txt \
 && tools/bin/python -m pip install --no-deps --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md source/
COPY pipeline source/pipeline
COPY training source/training
# The wheel holds the model room too; the line has no use for it. pip has none at run time.
RUN tools/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./source \
 && venv/bin/python -m pip install --no-deps wheels/*.whl \
 && rm -rf venv/lib/python3.11/site-packages/training venv/bin/logicrd-train \
 && venv/bin/python -m pip uninstall --yes setuptools pip \
 && python3 slim.py venv/lib/python3.11/site-packages

FROM ${BASE} AS base
# Python 3.11 is Debian's own, openssl is for signatures of models, LAPACK is OpenCV's (slim.py). The two lines behind it
# see that every library is found.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates openssl python3 liblapack3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/logicrd --create-home logicrd
COPY --from=build /opt/logicrd/venv /opt/logicrd/venv
ENV PATH=/opt/logicrd/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN python -c "import av, cv2, kafka, redis, tritonclient.grpc, PIL.Image, rich.traceback; av.CodecContext.create('hevc', 'r')" \
 && python -c "import boto3; boto3.client('s3', region_name='us-east-1'); boto3.client('sts', region_name='us-east-1')" \
 && python -c "import cv2, numpy; assert cv2.solve(numpy.eye(9), numpy.ones((9, 1)), flags=cv2.DECOMP_SVD)[1].sum() > 8.99"

FROM base AS camera
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-gi gir1.2-gst-rtsp-server-1.0 \
      gstreamer1.0-plugins-good gstreamer1.0-plugins-bad \
 && rm -rf /var/lib/apt/lists/*
COPY deploy/local/simulate.py deploy/local/rtsp_server.py /opt/logicrd/camera/
COPY deploy/local/parts /opt/logicrd/parts
USER 10001
EXPOSE 8554
ENTRYPOINT ["python3", "/opt/logicrd/camera/simulate.py", "--host", "0.0.0.0", "--port", "8554"]
CMD ["--camera", "tray=/opt/logicrd/parts/fastener-tray", "--camera", "cable=/opt/logicrd/parts/cable-set", "--rate", "2", "--loop"]

FROM base AS worker-genicam
LABEL org.opencontainers.image.title="LogicRD worker with GenICam"
# Aravis is used by Debian's Python, in a process of each camera's own.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-gi gir1.2-aravis-0.8 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /var/lib/logicrd
USER 10001
EXPOSE 9108
ENTRYPOINT ["logicrd"]
CMD ["run", "-c", "/etc/logicrd/line.yaml"]

FROM base AS worker
LABEL org.opencontainers.image.title="LogicRD worker"
WORKDIR /var/lib/logicrd
USER 10001
EXPOSE 9108
ENTRYPOINT ["logicrd"]
CMD ["run", "-c", "/etc/logicrd/line.yaml"]
