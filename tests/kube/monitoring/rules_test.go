// Package monitoring judges the mesh's alert rules by Prometheus' own code: they parse, their templates expand, and each
// fires on what it is for and on nothing else. Built by `cargo xtask kube build`, run by tests/tests/kube_monitoring.rs.
package monitoring

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
	"go.yaml.in/yaml/v3"
)

// The series of a mesh of two nodes that is well, a sample a minute for two hours.
const well = `
  kube_node_info{node="a"} 1x120
  kube_node_info{node="b"} 1x120
  nodemesh_agent_build_info{node="a"} 1x120
  nodemesh_agent_build_info{node="b"} 1x120
  nodemesh_agent_controller_connected{node="a"} 1x120
  nodemesh_agent_controller_connected{node="b"} 1x120
  nodemesh_agent_node_certificate_expiry_timestamp_seconds{node="a"} 86400x120
  nodemesh_agent_node_certificate_expiry_timestamp_seconds{node="b"} 86400x120
  nodemesh_controller_is_leader{pod="x"} 1x120
  nodemesh_controller_is_leader{pod="y"} 0x120
  nodemesh_controller_pods_not_captured{pod="x"} 0x120
  nodemesh_controller_ca_expires_timestamp_seconds{pod="x"} 31536000x120
`

// What each alert is for: a series as it is in a mesh that is well, what it is then (nothing if it is gone), and the
// node of the alert that fires.
var ill = map[string]struct{ series, instead, node string }{
	"NodemeshAgentAbsent":            {`nodemesh_agent_build_info{node="b"}`, "", "b"},
	"NodemeshAgentDisconnected":      {`nodemesh_agent_controller_connected{node="a"}`, "0x120", "a"},
	"NodemeshNodeCertificateExpires": {`nodemesh_agent_node_certificate_expiry_timestamp_seconds{node="b"}`, "9000x120", "b"},
	"NodemeshControllerAbsent":       {`nodemesh_controller_is_leader{pod="x"}`, "0x120", ""},
	"NodemeshPodsNotCaptured":        {`nodemesh_controller_pods_not_captured{pod="x"}`, "3x120", ""},
	"NodemeshRootExpires":            {`nodemesh_controller_ca_expires_timestamp_seconds{pod="x"}`, "864000x120", ""},
}

func rules(t *testing.T) []rulefmt.Rule {
	text, err := os.ReadFile(os.Getenv("NODEMESH_RULES"))
	if err != nil {
		t.Fatalf("NODEMESH_RULES names the PrometheusRule to judge: %v", err)
	}
	var object struct {
		Spec yaml.Node `yaml:"spec"`
	}
	if err := yaml.Unmarshal(text, &object); err != nil {
		t.Fatal(err)
	}
	spec, err := yaml.Marshal(&object.Spec)
	if err != nil {
		t.Fatal(err)
	}
	groups, problems := rulefmt.Parse(spec, false, model.UTF8Validation)
	for _, problem := range problems {
		t.Error(problem)
	}
	if groups == nil || len(problems) > 0 {
		t.FailNow()
	}
	var all []rulefmt.Rule
	for _, group := range groups.Groups {
		all = append(all, group.Rules...)
	}
	return all
}

// A value of a series.
type sample struct {
	t int64
	f float64
}

func (s sample) T() int64                      { return s.t }
func (s sample) F() float64                    { return s.f }
func (s sample) H() *histogram.Histogram       { return nil }
func (s sample) FH() *histogram.FloatHistogram { return nil }
func (s sample) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (s sample) Copy() chunks.Sample           { return s }

// Series that were chosen, one after the other.
type found struct {
	series []storage.Series
	at     int
}

func (f *found) Next() bool                        { f.at++; return f.at < len(f.series) }
func (f *found) At() storage.Series                { return f.series[f.at] }
func (f *found) Err() error                        { return nil }
func (f *found) Warnings() annotations.Annotations { return nil }

// The series of a text, each with a value a minute from the beginning of time.
func load(t *testing.T, text string) storage.Queryable {
	var all []storage.Series
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		name, values, err := parser.ParseSeriesDesc(strings.TrimSpace(line))
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		var samples []chunks.Sample
		for minute, value := range values {
			samples = append(samples, sample{int64(minute) * time.Minute.Milliseconds(), value.Value})
		}
		all = append(all, storage.NewListSeries(name, samples))
	}
	choose := func(_ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
		var chosen []storage.Series
		for _, series := range all {
			wrong := func(m *labels.Matcher) bool { return !m.Matches(series.Labels().Get(m.Name)) }
			if !slices.ContainsFunc(matchers, wrong) {
				chosen = append(chosen, series)
			}
		}
		return &found{series: chosen, at: -1}
	}
	return &storage.MockQueryable{MockQuerier: &storage.MockQuerier{SelectMockFunction: choose}}
}

// The nodes of the alerts that a rule fires, one after the other; an alert without a node is "".
func firing(t *testing.T, rule rulefmt.Rule, series string) []string {
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 100000, Timeout: time.Minute, LookbackDelta: 5 * time.Minute})
	end := time.Unix(0, 0).Add(100 * time.Minute)
	// It fires when its expression has held for as long as it says.
	query, err := engine.NewRangeQuery(context.Background(), load(t, series), nil, rule.Expr, end.Add(-time.Duration(rule.For)), end, time.Minute)
	if err != nil {
		t.Fatalf("%s: %v", rule.Alert, err)
	}
	defer query.Close()
	matrix, err := query.Exec(context.Background()).Matrix()
	if err != nil {
		t.Fatalf("%s: %v", rule.Alert, err)
	}
	nodes := []string{}
	steps := int(time.Duration(rule.For)/time.Minute) + 1
	for _, found := range matrix {
		if len(found.Floats) == steps {
			nodes = append(nodes, found.Metric.Get("node"))
		}
	}
	slices.Sort(nodes)
	return nodes
}

func TestRules(t *testing.T) {
	all := rules(t)
	if len(all) != len(ill) {
		t.Errorf("there are %d rules, and %d are judged here", len(all), len(ill))
	}
	for _, rule := range all {
		if rule.Annotations["summary"] == "" || rule.Labels["severity"] == "" {
			t.Errorf("%s says no summary or no severity", rule.Alert)
		}
		if nodes := firing(t, rule, well); len(nodes) > 0 {
			t.Errorf("%s fires in a mesh that is well, for %q", rule.Alert, nodes)
		}
		for alert, what := range ill {
			nodes, wanted := firing(t, rule, changed(t, what.series, what.instead)), []string{}
			if alert == rule.Alert {
				wanted = append(wanted, what.node)
			}
			if !slices.Equal(nodes, wanted) {
				t.Errorf("%s with %s %s: fires for %q, expected %q", rule.Alert, what.series, what.instead, nodes, wanted)
			}
		}
	}
}

// The series with one of them changed, or taken away.
func changed(t *testing.T, name, values string) string {
	text, found := "", false
	for line := range strings.Lines(well) {
		if !strings.HasPrefix(strings.TrimSpace(line), name+" ") {
			text += line
			continue
		}
		found = true
		if values != "" {
			text += "  " + name + " " + values + "\n"
		}
	}
	if !found {
		t.Fatalf("no series is called %s", name)
	}
	return text
}
