# docker build -f deploy/docker/isthmusd.Dockerfile -t isthmus/isthmusd:TAG .   (after CGO_ENABLED=0 make build)
FROM gcr.io/distroless/static-debian12:nonroot
COPY build/bin/isthmusd build/bin/isthmus /usr/local/bin/
USER 1337:1337
ENTRYPOINT ["/usr/local/bin/isthmusd"]
