# A server on CPUs: docker build -f launch/container/cpu.Dockerfile -t transfusion-cpu .
# Without CUDA's libraries torch takes a tenth of the room. TORCH_INDEX names a package index that has such a build.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /project
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY kernels kernels
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" torch \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt ".[serve]" \
    && find /venv -name __pycache__ -prune -exec rm -rf {} +

FROM python:3.11-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin transfusion
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# A model folder stands at /model, a file with the token at /run/secrets/token.
ENTRYPOINT ["transfusion", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--token-file", "/run/secrets/token"]
