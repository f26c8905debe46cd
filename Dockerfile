# docker build -t sarathi . && docker run -p 8000:8000 sarathi
# docker build -t sarathi-cuda --build-arg VARIANT=cuda . && docker run --gpus all -p 8000:8000 sarathi-cuda MODEL
ARG VARIANT=cpu

FROM python:3.12-slim AS build
ARG VARIANT
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY csrc csrc
COPY vattention vattention
COPY sarathi sarathi
RUN python -m venv /opt/sarathi
ENV PATH=/opt/sarathi/bin:$PATH
# On the CPU, torch comes from the index without CUDA: 200 MB in place of several GB.
RUN if [ "$VARIANT" = cpu ]; then \
      pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch \
      && pip install --no-cache-dir ".[server]"; \
    else pip install --no-cache-dir ".[server,cuda]"; fi

FROM python:3.12-slim
COPY --from=build /opt/sarathi /opt/sarathi
RUN useradd --create-home sarathi
USER sarathi
ENV PATH=/opt/sarathi/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
# SIGTERM drains: give the container as long to end as --shutdown-timeout-s.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=300s CMD \
  python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"
ENTRYPOINT ["sarathi", "serve", "--host", "0.0.0.0"]
