# Triptych in the NGC Triton container; see docker/README.md.
# hadolint ignore=DL3006
ARG TRITON_TAG
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}
# the image's Python belongs to the distribution
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/triptych
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY backends backends
COPY python_models python_models
COPY client client
COPY triptych triptych
RUN python3 -m pip install --no-cache-dir -c constraints.txt .
COPY docker/server.sh /usr/local/bin/triptych-server
# The server puts its working directory on the import path of every model process; it must not be the source tree.
WORKDIR /var/lib/triptych
# checkpoints from the hub, and compiled kernels: mount volumes here to keep them
ENV HF_HOME=/var/lib/triptych/huggingface TRITON_CACHE_DIR=/var/lib/triptych/kernels
EXPOSE 30000 8000 8001 8002
ENTRYPOINT ["triptych-server"]
