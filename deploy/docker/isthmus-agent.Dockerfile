# docker build -f deploy/docker/isthmus-agent.Dockerfile -t isthmus/isthmus-agent:TAG .   (after CGO_ENABLED=0 make build envoy)
FROM gcr.io/distroless/base-debian12:nonroot
COPY build/bin/isthmus-agent build/envoy/envoy /usr/local/bin/
USER 1337:1337
ENTRYPOINT ["/usr/local/bin/isthmus-agent"]
