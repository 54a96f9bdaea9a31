# The project and its packages (docs/clusters.md). Data, models and results come from outside:
#   docker build -t rm-lora-glue . && docker run --rm rm-lora-glue AdaLoRA/run_glue.py --help
FROM python:3.11-slim
# git: run.json records the commit. wget: with it KubeRay looks whether a pod lives.
RUN apt-get update && apt-get install -y --no-install-recommends git wget && rm -rf /var/lib/apt/lists/* && \
    git config --system --add safe.directory /opt/rm-lora-glue
WORKDIR /opt/rm-lora-glue
# The packages are gigabytes. They have a layer of their own, which is made anew only if one of these files changes.
COPY setup.py pyproject.toml constraints.txt ./
COPY loralib/__init__.py loralib/
# ray[default]: KubeRay submits its jobs to Ray's dashboard.
RUN pip install --no-cache-dir -c constraints.txt -e '.[sweep]' 'ray[default]'
COPY . .
# The caches of models and data: mount a volume here, so that they outlive the container.
ENV HF_HOME=/cache PYTHONUNBUFFERED=1
ENTRYPOINT ["python"]
