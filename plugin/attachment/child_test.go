package attachment

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests run this binary again where they need another process. What it
// shall do comes in the environment.
const childEnv = "SKIPSTACK_TEST_CHILD"

type childJob struct {
	Do     string // "put", "delete", "lock", "churn", "refcount"
	Dir    string
	Record Record
	StopAt int // put and delete: pause at this step; -1: never
	Worker int
}

func TestMain(m *testing.M) {
	if raw, ok := os.LookupEnv(childEnv); ok {
		var job childJob
		err := json.Unmarshal([]byte(raw), &job)
		if err == nil {
			err = job.run()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// pause tells the parent what has been reached, and waits until it says to go
// on or is gone.
func pause(reached string) {
	fmt.Println(reached)
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func (j childJob) run() error {
	s := NewStore(j.Dir)
	switch j.Do {
	case "put", "delete":
		step := 0
		s.hook = func(name string) {
			if step == j.StopAt {
				pause(name)
			}
			step++
		}
		if j.Do == "put" {
			return s.Put(j.Record)
		}
		return s.Delete(j.Record.Key)
	case "lock":
		l, err := s.Lock(context.Background())
		if err != nil {
			return err
		}
		pause("locked")
		return l.Unlock()
	case "churn":
		t := &childTB{}
		churn(t, s, j.Worker, 60)
		return t.err
	case "refcount":
		return refcount(s, j.Worker, 25)
	}
	return fmt.Errorf("unknown job %q", j.Do)
}

// childTB lets a child use helpers that report to a test.
type childTB struct {
	testing.TB
	err error
}

func (t *childTB) Errorf(format string, args ...any) { t.err = fmt.Errorf(format, args...) }

type child struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdin  io.Closer
	stdout *bufio.Reader
	stderr strings.Builder
	waited bool
}

func startChild(t *testing.T, job childJob) *child {
	t.Helper()
	raw, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: exec.Command("/proc/self/exe")}
	// The race detector would otherwise wait a second before each exit.
	c.cmd.Env = append(os.Environ(), childEnv+"="+string(raw), "GORACE=atexit_sleep_ms=0")
	c.cmd.Stderr = &c.stderr
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.stdout = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	return c
}

// reached waits until the child pauses.
func (c *child) reached() string {
	c.t.Helper()
	line, err := c.stdout.ReadString('\n')
	if err != nil {
		c.t.Fatalf("child did not pause: %v (%v, %s)", err, c.wait(), c.stderr.String())
	}
	return strings.TrimSpace(line)
}

func (c *child) wait() error {
	c.waited = true
	return c.cmd.Wait()
}

// finish lets the child go on and waits for its end.
func (c *child) finish() error {
	c.stdin.Close()
	_, _ = io.Copy(io.Discard, c.stdout)
	if err := c.wait(); err != nil {
		return fmt.Errorf("%w: %s", err, c.stderr.String())
	}
	return nil
}

func (c *child) kill() {
	if !c.waited {
		_ = c.cmd.Process.Kill()
		_ = c.wait()
	}
}

// stop stops the child with SIGSTOP and waits until it has stopped.
func (c *child) stop() {
	c.t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		c.t.Fatal(err)
	}
	var info unix.Siginfo
	err := retry(func() error {
		return unix.Waitid(unix.P_PID, c.cmd.Process.Pid, &info, unix.WSTOPPED|unix.WNOWAIT, nil)
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

// change is an operation that is interrupted.
type change struct {
	name   string
	before []Record // written first
	do     string
	record Record
}

func changes() []change {
	r := func(id uint64) Record { return testRecord(1, id) }
	neighbour := testRecord(2, 7)
	return []change{
		{"first put", nil, "put", r(7)},
		{"put beside another", []Record{neighbour}, "put", r(7)},
		{"put without cgroup", []Record{neighbour}, "put", r(0)},
		{"put again", []Record{neighbour, r(7)}, "put", r(7)},
		{"put again alone", []Record{r(7)}, "put", r(7)},
		{"put moves", []Record{neighbour, r(7)}, "put", r(8)},
		{"put moves alone", []Record{r(8)}, "put", r(9)},
		{"put moves beside another", []Record{neighbour, r(8)}, "put", r(7)},
		{"put loses cgroup", []Record{r(7)}, "put", r(0)},
		{"put gets cgroup", []Record{neighbour, r(0)}, "put", r(7)},
		{"delete", []Record{neighbour, r(7)}, "delete", r(7)},
		{"delete last", []Record{r(7)}, "delete", r(7)},
		{"delete without cgroup", []Record{neighbour, r(0)}, "delete", r(0)},
	}
}

// steps returns the steps of the change, which has then been made.
func (c change) steps(t *testing.T, s *Store) []string {
	t.Helper()
	mustPut(t, s, c.before...)
	var steps []string
	hooked := NewStore(s.dir)
	hooked.hook = func(name string) { steps = append(steps, name) }
	var err error
	if c.do == "put" {
		err = hooked.Put(c.record)
	} else {
		err = hooked.Delete(c.record.Key)
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(steps) < 1 {
		t.Fatal("no steps seen")
	}
	return steps
}

// pausedAt starts the change in a child that pauses at the step.
func (c change) pausedAt(t *testing.T, s *Store, step int) *child {
	t.Helper()
	mustPut(t, s, c.before...)
	child := startChild(t, childJob{Do: c.do, Dir: s.dir, Record: c.record, StopAt: step})
	child.reached()
	return child
}

// others are the records that the change does not concern.
func (c change) others() []Record {
	return slices.DeleteFunc(slices.Clone(c.before), func(r Record) bool { return r.Key == c.record.Key })
}

// wantNoHalf fails unless the record is as before the change or as after it.
func (c change) wantNoHalf(t *testing.T, s *Store) {
	t.Helper()
	allowed := []uint64{}
	absent := c.do == "delete" || len(c.others()) == len(c.before)
	for _, r := range append(slices.Clone(c.before), c.record) {
		if r.Key == c.record.Key {
			allowed = append(allowed, r.CgroupID)
		}
	}
	got, err := s.Get(c.record.Key)
	if isAbsent := err != nil; isAbsent && !absent || !isAbsent && !slices.Contains(allowed, got.CgroupID) {
		t.Errorf("Get = %+v, %v", got, err)
	}
}

// eachStep runs check with the change interrupted at each of its steps.
func eachStep(t *testing.T, check func(t *testing.T, c change, s *Store, paused *child)) {
	for _, c := range changes() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for i, step := range c.steps(t, newTestStore(t)) {
				t.Run(fmt.Sprintf("%d %s", i, step), func(t *testing.T) {
					s := newTestStore(t)
					check(t, c, s, c.pausedAt(t, s, i))
				})
			}
		})
	}
}

// A process killed at any step leaves the old record or the new one, with its
// index entry, and what is left over goes with the next operation.
func TestKilledAtEachStep(t *testing.T) {
	menders := map[string]func(t *testing.T, c change, s *Store) []Record{
		"read": func(t *testing.T, c change, s *Store) []Record {
			r, err := s.Get(c.record.Key)
			if err != nil {
				return c.others()
			}
			return append(c.others(), r)
		},
		"put": func(t *testing.T, c change, s *Store) []Record {
			mustPut(t, s, c.record)
			return append(c.others(), c.record)
		},
		"delete": func(t *testing.T, c change, s *Store) []Record {
			mustDelete(t, s, c.record.Key)
			return c.others()
		},
	}
	for name, mend := range menders {
		t.Run(name, func(t *testing.T) {
			eachStep(t, func(t *testing.T, c change, s *Store, paused *child) {
				paused.kill()
				c.wantNoHalf(t, s)
				wantIndexed(t, s, 7, 8, 9)
				records := mend(t, c, s)
				wantIndexed(t, s, 7, 8, 9)
				wantExactly(t, s, records...)
			})
		})
	}
	t.Run("repair", func(t *testing.T) {
		eachStep(t, func(t *testing.T, c change, s *Store, paused *child) {
			paused.kill()
			if err := s.Repair(); err != nil {
				t.Fatal(err)
			}
			c.wantNoHalf(t, s)
			all, err := s.List()
			if err != nil {
				t.Fatal(err)
			}
			wantExactly(t, s, all...)
			wantIndexed(t, s, 7, 8, 9)
		})
	})
}

// Whatever others do while a writer stands still, at any step, neither waits
// for the other, and the writer's record is whole once it has gone on.
func TestPausedAtEachStep(t *testing.T) {
	t.Run("others read and repair", func(t *testing.T) {
		eachStep(t, func(t *testing.T, c change, s *Store, paused *child) {
			c.wantNoHalf(t, s)
			wantIndexed(t, s, 7, 8, 9)
			if err := s.Repair(); err != nil {
				t.Error(err)
			}
			beside := testRecord(3, c.record.CgroupID)
			mustPut(t, s, beside)
			mustDelete(t, s, beside.Key)
			wantIndexed(t, s, 7, 8, 9)
			if err := paused.finish(); err != nil {
				t.Fatal(err)
			}
			want := c.others()
			if c.do == "put" {
				want = append(want, c.record)
			}
			wantRecordsIndexed(t, s)
			wantIndexed(t, s, 7, 8, 9)
			wantExactly(t, s, want...)
		})
	})
	rivals := map[string]func(s *Store, k Key) error{
		"same cgroup":  func(s *Store, k Key) error { return s.Put(Record{Key: k, Status: Attached, CgroupID: 7}) },
		"other cgroup": func(s *Store, k Key) error { return s.Put(Record{Key: k, Status: Attached, CgroupID: 9}) },
		"no cgroup":    func(s *Store, k Key) error { return s.Put(Record{Key: k, Status: Skipped}) },
		"delete":       func(s *Store, k Key) error { return s.Delete(k) },
	}
	for name, rival := range rivals {
		t.Run("rival "+name, func(t *testing.T) {
			eachStep(t, func(t *testing.T, c change, s *Store, paused *child) {
				if err := rival(s, c.record.Key); err != nil {
					t.Error(err)
				}
				wantRecordsIndexed(t, s)
				if err := paused.finish(); err != nil {
					t.Fatal(err)
				}
				wantRecordsIndexed(t, s)
				wantIndexed(t, s, 7, 8, 9)
				if err := s.Repair(); err != nil {
					t.Error(err)
				}
				all, err := s.List()
				if err != nil {
					t.Error(err)
				}
				wantExactly(t, s, all...)
			})
		})
	}
}

// wantRecordsIndexed looks for the index entries themselves, and repairs
// nothing.
func wantRecordsIndexed(t *testing.T, s *Store) {
	t.Helper()
	paths := snapshot(t, s)
	for n := range 4 {
		r, err := s.Get(testKey(n))
		entry := cgroupsDir + "/" + cgroupName(r.CgroupID) + "/" + entryName(testKey(n).FileName(), "*")
		if err == nil && r.CgroupID != 0 && !slices.Contains(paths, entry) {
			t.Errorf("record %d has no index entry for cgroup %d; there are\n\t%s", n, r.CgroupID, strings.Join(paths, "\n\t"))
		}
	}
}

func TestConcurrentProcesses(t *testing.T) {
	s := newTestStore(t)
	var children []*child
	for w := range 4 {
		children = append(children, startChild(t, childJob{Do: "churn", Dir: s.dir, Worker: w}))
	}
	churn(t, s, 4, 60)
	for _, c := range children {
		if err := c.finish(); err != nil {
			t.Error(err)
		}
	}
	afterChurn(t, s)
}

// Children die at random moments, not only where a hook is.
func TestKilledAtAnyMoment(t *testing.T) {
	s := newTestStore(t)
	for i := range 30 {
		c := startChild(t, childJob{Do: "churn", Dir: s.dir, Worker: i})
		// The moment is the point here, not what is reached by then.
		time.Sleep(time.Duration(i%10) * 3 * time.Millisecond)
		c.kill()
		wantRecordsIndexed(t, s)
		wantIndexed(t, s, 1, 2, 3)
	}
	afterChurn(t, s)
}
