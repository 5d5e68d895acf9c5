package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

func exists(file string) bool {
	_, err := os.Stat(file)
	return !errors.Is(err, fs.ErrNotExist)
}

func readFile(file, remedy string) ([]byte, error) {
	f, err := os.Open(file)
	if err == nil {
		defer f.Close()
		var data []byte
		if data, err = io.ReadAll(io.LimitReader(f, maxFile)); err == nil {
			return data, nil
		}
	}
	reason := ReasonUnreadable
	if errors.Is(err, fs.ErrNotExist) {
		reason = ReasonMissing
	}
	return nil, &Invalid{File: file, Reason: reason, Message: err.Error(), Remedy: remedy}
}

func readCerts(file, remedy string) ([]*x509.Certificate, error) {
	data, err := readFile(file, remedy)
	if err != nil {
		return nil, err
	}
	return parseCerts(file, data, remedy)
}

// parseCerts reads all certificates in PEM; file names them in errors.
func parseCerts(file string, data []byte, remedy string) ([]*x509.Certificate, error) {
	if len(data) == 0 {
		return nil, &Invalid{File: file, Reason: ReasonMissing, Message: "it is missing or empty", Remedy: remedy}
	}
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if block.Type != "CERTIFICATE" || err != nil || len(out) == maxChain {
			return nil, &Invalid{File: file, Reason: ReasonNotPEM, Message: fmt.Sprintf("PEM block %d is not one of at most %d certificates", len(out)+1, maxChain), Remedy: remedy}
		}
		out = append(out, c)
	}
	if len(out) == 0 || len(bytes.TrimSpace(data)) > 0 {
		return nil, &Invalid{File: file, Reason: ReasonNotPEM, Message: fmt.Sprintf("text that is no certificate in PEM after %d certificates", len(out)), Remedy: remedy}
	}
	return out, nil
}

func readKey(file, remedy string) (crypto.Signer, error) {
	data, err := readFile(file, remedy)
	if err != nil {
		return nil, err
	}
	return parseKeyPEM(file, data, remedy)
}

// parseKeyPEM reads the first private key in PEM.
func parseKeyPEM(file string, data []byte, remedy string) (crypto.Signer, error) {
	if len(data) == 0 {
		return nil, &Invalid{File: file, Reason: ReasonMissing, Message: "it is missing or empty", Remedy: remedy}
	}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return nil, &Invalid{File: file, Reason: ReasonNotPEM, Message: "there is no private key in PEM (PKCS 8, PKCS 1 or SEC 1, without a password)", Remedy: remedy}
		}
		if signer := parseKey(block.Bytes); signer != nil {
			return signer, nil
		}
	}
}

func parseKey(der []byte) crypto.Signer {
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		signer, _ := k.(crypto.Signer)
		return signer
	}
	if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return k
	}
	if k, err := x509.ParseECPrivateKey(der); err == nil {
		return k
	}
	return nil
}

func writeKey(file string, signer crypto.Signer) error {
	data, err := encodeKey(signer)
	if err != nil {
		return fmt.Errorf("key for %s: %w", file, err)
	}
	return writeFile(file, data, 0o600)
}

// encodeKey gives PKCS 8 in PEM.
func encodeKey(signer crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// writeFile makes a file that is there whole or not at all, also after a crash. It does not replace an existing one.
func writeFile(file string, data []byte, mode fs.FileMode) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", file, err)
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(f.Chmod(mode), write(f, data), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), file); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func write(w io.Writer, data []byte) error {
	_, err := w.Write(data)
	return err
}
