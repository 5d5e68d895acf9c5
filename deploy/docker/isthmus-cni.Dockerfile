# docker build -f deploy/docker/isthmus-cni.Dockerfile -t isthmus/isthmus-cni:TAG .   (after CGO_ENABLED=0 make build)
FROM gcr.io/distroless/static-debian12
COPY build/bin/isthmus-cni /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/isthmus-cni"]
