# The inference server: NVIDIA's image as it is, with what the Mahalanobis step (Python backend) imports, pinned, and a
# user that is not root. Models are mounted.
#
#   docker build -f deploy/docker/triton.Dockerfile -t logicrd-triton .
#   docker run --gpus all --shm-size 256m -p 8001:8001 -v ./models_repo:/models:ro logicrd-triton
#
# Never built or run here: neither a container engine nor a GPU was at hand. Whoever builds it gives the digest:
#   --build-arg BASE=nvcr.io/nvidia/tritonserver:26.08-py3@sha256:...
ARG BASE=nvcr.io/nvidia/tritonserver:26.08-py3
FROM ${BASE}

# The backend's process takes its packages from the image's own Python.
COPY requirements/triton-image.txt /tmp/requirements.txt
RUN python3 -m pip install --no-cache-dir --break-system-packages --no-deps --require-hashes -r /tmp/requirements.txt \
 && rm /tmp/requirements.txt \
 && useradd --system --uid 10001 --no-create-home logicrd
LABEL org.opencontainers.image.title="LogicRD Triton"
USER 10001
EXPOSE 8000 8001 8002
ENTRYPOINT ["tritonserver"]
# A draining server answers what it holds; connections are renewed, so that a new replica is found by other clients too.
CMD ["--model-repository=/models", "--model-control-mode=explicit", "--load-model=*", "--strict-readiness=false", \
     "--exit-timeout-secs=20", "--grpc-http2-min-recv-ping-interval-without-data=10000", "--grpc-http2-max-ping-strikes=0", \
     "--metrics-config=histogram_latencies=true", \
     "--backend-config=python,shm-default-byte-size=16777216"]
