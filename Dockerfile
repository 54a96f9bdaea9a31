# The project and its packages (docs/clusters.md). Data, models and results come from outside:
#   docker build -t rm-lora-glue . && docker run --rm rm-lora-glue AdaLoRA/run_glue.py --help
FROM python:3.12-slim
# git: run.json records the commit. wget: with it KubeRay looks whether a pod lives.
RUN apt-get update && apt-get install -y --no-install-recommends git wget && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/rm-lora-glue
COPY . .
RUN git config --system --add safe.directory /opt/rm-lora-glue && \
    pip install --no-cache-dir -c constraints.txt -e '.[sweep]'
# The caches of models and data: mount a volume here, so that they outlive the container.
ENV HF_HOME=/cache PYTHONUNBUFFERED=1
ENTRYPOINT ["python"]
