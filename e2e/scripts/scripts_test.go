package scripts_test

import (
	"context"
	"os"
	"testing"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/scripts"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(func(context.Context) int { return m.Run() })) }

func TestStories(t *testing.T) { scripts.Run(t, scripts.Config{Dir: "testdata"}) }

// TestSoak runs the longer stories; "make soak" asks for them.
func TestSoak(t *testing.T) {
	if os.Getenv("SOAK") == "" {
		t.Skip("the longer stories: make soak")
	}
	scripts.Run(t, scripts.Config{Dir: "soak"})
}
