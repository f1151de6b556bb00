# An image of serve.py. Written without a Docker at hand: it has not been built.
#   docker build -t hidream --build-arg TORCH=cpu .      for a machine without a GPU
#   docker build -t hidream --build-arg TORCH=cu130 .    for NVIDIA's GPUs
#   docker run -p 127.0.0.1:8000:8000 hidream

# slim: Debian without compilers; the wheels that are installed bring everything they need.
FROM python:3.12-slim

# Which build of torch: the CPU's is a tenth of CUDA's size. From PyPI comes CUDA's.
ARG TORCH=cpu

# Nobody's account: what is broken into the server can write to its own folders alone.
RUN useradd --create-home --uid 1000 hidream && mkdir /models && chown hidream /models
WORKDIR /home/hidream/app

# What changes seldom comes first, so that a change of the code does not download torch again.
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/${TORCH} -c constraints.txt torch \
 && pip install --no-cache-dir -c constraints.txt -r requirements.txt

# The code and the bundled model; .dockerignore leaves the rest out.
COPY --chown=hidream . .
USER hidream

# Models that are downloaded stay in a volume, which outlives the container.
ENV HF_HOME=/models
VOLUME /models

# Logs are written line by line, and pip's and Python's own files are not kept.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

EXPOSE 8000

# Ready means that the model is loaded; the first start may download for a long time.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready')"]

# exec form: SIGTERM reaches Python, which answers what was admitted. Inside a container every address is meant; which of
# the host's addresses is published, and to whom, `docker run -p` decides. Anything after the image's name is a flag.
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
CMD ["--no_auth"]
