# docker build -f deploy/docker/coredns.Dockerfile -t isthmus/coredns:TAG .   (after CGO_ENABLED=0 make build)
FROM gcr.io/distroless/static-debian12:nonroot
COPY build/bin/coredns /usr/local/bin/
USER 1337:1337
ENTRYPOINT ["/usr/local/bin/coredns"]
