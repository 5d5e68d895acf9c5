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
