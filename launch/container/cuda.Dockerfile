# A server on NVIDIA GPUs: docker build -f launch/container/cuda.Dockerfile -t transfusion-cuda .
# torch brings CUDA's libraries, and the host the driver: docker run --gpus all. Triton needs a C compiler.
FROM python:3.11-slim AS build
WORKDIR /project
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY kernels kernels
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt ".[serve,triton]" \
    && find /venv -name __pycache__ -prune -exec rm -rf {} +

FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin transfusion
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=180s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# A model folder stands at /model, a file with the token at /run/secrets/token.
ENTRYPOINT ["transfusion", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--token-file", "/run/secrets/token"]
