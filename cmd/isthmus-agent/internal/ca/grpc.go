package ca

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Connector gives a connection to the control plane; withCertificate says whether the workload's certificate is
// presented on it.
type Connector func(ctx context.Context, withCertificate bool) (*grpc.ClientConn, error)

// maxToken is the largest token file that is read.
const maxToken = 64 << 10

// Istio returns a Sign that asks istio.v1.auth.IstioCertificateService: the first time with the token in tokenFile,
// then with the certificate it has. With always the token, read anew, comes first each time: it says that the workload
// still exists.
func Istio(connect Connector, tokenFile string, always bool) Sign {
	return func(ctx context.Context, csr []byte, ttl time.Duration, current *Certificate) ([]string, error) {
		ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		if current == nil || always {
			token, err := readToken(tokenFile)
			if err != nil {
				return nil, err
			}
			current = nil
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
		}
		conn, err := connect(ctx, current != nil)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		reply, err := securityv1alpha1.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx,
			&securityv1alpha1.IstioCertificateRequest{Csr: string(csr), ValidityDuration: int64(ttl / time.Second)},
			grpc.MaxCallRecvMsgSize(1<<20))
		if err != nil {
			return nil, fmt.Errorf("sign certificate request at %s: %w", upstream.Address(conn), err)
		}
		return reply.GetCertChain(), nil
	}
}

func readToken(path string) (string, error) {
	if path == "" {
		return "", diag.Hint(fmt.Errorf("no valid certificate and no token to get one with"), "join the machine again: isthmus-agent join TOKEN")
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", diag.Hint(fmt.Errorf("read token: %w", err), "set tokenFile to the workload's token")
	}
	if info.Size() > maxToken {
		return "", fmt.Errorf("token %s: over %d bytes", path, maxToken)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsAny(token, "\r\n") {
		return "", fmt.Errorf("token %s: not one line", path)
	}
	return token, nil
}

// CheckToken reports whether the first request could be made at all.
func CheckToken(path string) error {
	_, err := readToken(path)
	return err
}
