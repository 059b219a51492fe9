# Triptych in the NGC Triton container: docker build -f docker/server.Dockerfile -t triptych .
ARG TRITON_TAG=24.12-py3
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}
WORKDIR /opt/triptych
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY backends backends
COPY python_models python_models
COPY client client
RUN python3 -m pip install --no-cache-dir -c constraints.txt .
# The server puts its working directory on the import path of every model process; it must not be the source tree.
WORKDIR /var/lib/triptych
EXPOSE 30000 8000 8001 8002
ENTRYPOINT ["triptych", "serve"]
CMD ["--host", "0.0.0.0"]
