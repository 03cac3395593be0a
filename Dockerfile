# Images of cpcr. Two targets:
#   docker build --target cpu  -t cpcr:0.1.0-cpu .
#   docker build --target cuda -t cpcr:0.1.0-cuda .      (needs a host driver of 580 or newer to run)
# libtorch is fetched by scripts/setup.sh from the same locks as everywhere else. scripts/test-image.sh makes the same last stage without Docker
# and runs k8s/overlays/trial in it.

FROM rust:1.95-bookworm AS toolchain
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3 python3-pip && rm -rf /var/lib/apt/lists/*
ENV CPCR_CACHE=/opt/cpcr
WORKDIR /src
# libtorch has a layer of its own: a change of the source does not fetch it again.
COPY scripts ./scripts

FROM toolchain AS build-cpu
RUN scripts/setup.sh --cpu
COPY . .
RUN scripts/setup.sh --cpu && cargo build --release --locked --bins

FROM toolchain AS build-cuda
RUN scripts/setup.sh --cuda
COPY . .
RUN scripts/setup.sh --cuda && cargo build --release --locked --bins && scripts/build-nccl.sh

# The binaries and what they load at run time, and nothing of Python, headers or static libraries.
FROM build-cpu AS tree-cpu
RUN scripts/install.sh /out/usr/local

FROM build-cuda AS tree-cuda
RUN scripts/install.sh /out/usr/local

FROM debian:bookworm-slim AS base
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libgomp1 libstdc++6 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin cpcr
COPY configs /usr/share/cpcr/configs
USER 10001:10001
WORKDIR /tmp
# SIGTERM: write a checkpoint, then exit with 75.
STOPSIGNAL SIGTERM
ENTRYPOINT ["cpcr"]

FROM base AS cuda
COPY --from=tree-cuda /out/ /
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The last target is what a plain `docker build .` makes.
FROM base AS cpu
COPY --from=tree-cpu /out/ /
