# docker build -t elrar/state-gateway:latest .
ARG BASE=python:3.13-slim
FROM ${BASE}

LABEL org.opencontainers.image.title="ELRAR State Gateway" \
      org.opencontainers.image.description="Keeps the latest state of every vLLM engine and says how fresh it is"

# What .dockerignore lets through, and nothing else.
COPY . /app/

# Modes that do not depend on the checkout's umask. /data is the gateway's user's, and group 0's, in which platforms
# that choose the user themselves (OpenShift) put it. Run once, it leaves the byte code of all that it imports: the base
# image has none, and the gateway's user may not write there, so that every start and health check would compile it.
RUN chmod -R u=rwX,go=rX /app \
 && chmod a+x /app/docker-entrypoint.sh \
 && mkdir /data \
 && chown 65532:0 /data \
 && chmod 775 /data \
 && python3 /app/gateway.py --version

# For the state log. No VOLUME: each container without -v would leave an anonymous one behind.
WORKDIR /data

EXPOSE 9999/udp 9999/tcp

# No USER: it begins as root, to give /data away, and leaves root for good before the gateway starts. --user works, too.
ENTRYPOINT ["/app/docker-entrypoint.sh"]

# Asks /livez. Where HTTP_PORT is off or 0 there is nobody to ask: docker run --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/app/docker-entrypoint.sh", "--health-check"]
