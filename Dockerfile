# rlx with everything for GPUs: docker build -t rlx .
#
# The base gives CUDA 13.0 with its compiler, cuDNN and NCCL. Python packages live in an environment of their own: the
# engine pins another torch than the base's. What changes least comes first.
FROM nvcr.io/nvidia/pytorch:25.10-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The base constrains pip to its own torch.
ENV PIP_CONSTRAINT="" \
    PYTHON=/opt/rlx/bin/python \
    PATH=/opt/rlx/bin:$PATH

RUN python3.12 -m venv /opt/rlx

COPY launch/install.sh launch/constraints.txt launch/constraints-gpu.txt /src/launch/
RUN /src/launch/install.sh torch
RUN /src/launch/install.sh apex
RUN /src/launch/install.sh te
RUN /src/launch/install.sh engine

COPY setup.py pyproject.toml README.md LICENSE /src/
COPY launch /src/launch
COPY rlx /src/rlx
COPY converters /src/converters
COPY configs /src/configs
RUN /src/launch/install.sh rlx

RUN useradd --create-home --uid 10001 rlx && mkdir /work && chown rlx:rlx /work
USER 10001
WORKDIR /work

# A build machine has no GPU: that is a note to the doctor, a wrong or missing package is not.
RUN rlx doctor
CMD ["rlx", "doctor"]
