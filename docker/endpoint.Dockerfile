# The OpenAI-compatible endpoint alone: no torch, no GPU; see docker/README.md.
# hadolint ignore=DL3006
ARG ENDPOINT_BASE
FROM ${ENDPOINT_BASE}
# where the image's Python belongs to the distribution
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/triptych
COPY docker/endpoint.txt ./
RUN python3 -m pip install --no-cache-dir -r endpoint.txt
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY backends backends
COPY python_models python_models
COPY client client
COPY triptych triptych
RUN python3 -m pip install --no-cache-dir --no-deps .
COPY docker/endpoint.sh /usr/local/bin/triptych-endpoint
WORKDIR /var/lib/triptych
USER 1000
EXPOSE 30000
ENTRYPOINT ["triptych-endpoint"]
