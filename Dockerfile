# megabts on NVIDIA's PyTorch image, which already holds torch, Transformer Engine, apex and NCCL, built together.
#
#   docker build -t megabts .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/megabts/runs" megabts
#   bash examples/quickstart.sh --no-venv          # inside; --no-venv everywhere: nothing is to be installed
#
# `--build-arg UID=$(id -u)` makes the files written to mounted folders yours. No model is downloaded here.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

# The image pins its own packages through this variable; they are kept by --no-deps below instead.
ENV PIP_CONSTRAINT=""

# What the image may lack. None of these asks for torch, so none can replace the image's build of it.
RUN pip install --no-cache-dir sentencepiece tokenizers safetensors "jsonargparse[signatures]" docstring-parser rich

WORKDIR /workspace/megabts
COPY . .
RUN pip install --no-cache-dir --no-deps -e .

ARG UID=1000
RUN useradd --create-home --non-unique --uid ${UID} megabts && mkdir -p runs && chown -R ${UID} /workspace/megabts
USER megabts

CMD ["bash"]
