package bench

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/node"
)

// gateTimeout is how long a first probe of the kernel may take.
const gateTimeout = 30 * time.Second

// attached says that ADD has attached a pod, or why it has not.
func (s *nodeSite) attached(p *node.Pod) (attachment.Record, error) {
	record, err := attachment.NewStore(s.runDir).Get(s.key(p))
	if err != nil {
		return record, fmt.Errorf("read the attachment of pod %s: %w", p.Name, err)
	}
	if record.Status != attachment.Attached {
		return record, fmt.Errorf("%w: pod %s: %s: %s", errNotAllowed, p.Name, record.Status, record.Reason)
	}
	return record, nil
}

// waitForGate waits until the kernel's verdict is in and the node's gate open, and
// checks what follows for the two pods.
func (s *nodeSite) waitForGate(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, gateTimeout, fmt.Errorf("%w: no verdict on this kernel after %v", errNotAllowed, gateTimeout))
	defer cancel()
	for {
		v, err := verdict.CachedBy(s.program, s.runDir)
		if err == nil && v.Level == verdict.Unsupported {
			return fmt.Errorf("%w: the kernel's verdict is %s", errNotAllowed, v)
		}
		var settings datapath.NodeSettings
		if err == nil && s.set == nil {
			s.set, err = datapath.Open(s.bpffs)
		}
		if err == nil {
			settings, err = s.set.Node()
		}
		if err == nil && settings.Open {
			s.verdict, s.noEpoll = v.String(), v.Risks&datapath.RiskEpoll != 0
			return errors.Join(s.accelerated(s.client, settings), s.accelerated(s.server, settings))
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// accelerated checks that connections of a pod will be accelerated.
func (s *nodeSite) accelerated(p *node.Pod, n datapath.NodeSettings) error {
	record, err := s.attached(p)
	if err != nil {
		return err
	}
	settings, known, err := s.set.Pod(record.CgroupID)
	if err != nil {
		return err
	}
	if n.SwitchedOff {
		return fmt.Errorf("%w: acceleration is switched off on this node (`skipstack on` switches it on); the kernel's verdict is %s", errNotAllowed, s.verdict)
	}
	if !known || !n.Accelerates(settings) {
		return fmt.Errorf("%w: pod %s: the kernel's verdict is %s, the pod accepts [%s]", errNotAllowed, p.Name, s.verdict, settings.Accepted)
	}
	return nil
}

// changed says why connections of the pods are no longer accelerated, which they were
// when the bench began; "" if they are.
func (s *nodeSite) changed() string {
	settings, err := s.set.Node()
	if err != nil {
		return "the node's settings cannot be read any more: " + err.Error()
	}
	switch {
	case settings.SwitchedOff:
		return "acceleration was switched off on this node meanwhile (`skipstack on` switches it on)"
	case !settings.Open:
		return "the node's gate was closed meanwhile: no connection is accelerated"
	}
	if err := errors.Join(s.accelerated(s.client, settings), s.accelerated(s.server, settings)); err != nil {
		return "meanwhile " + strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return ""
}

func (s *nodeSite) key(p *node.Pod) attachment.Key {
	return attachment.Key{Network: s.network, ContainerID: p.ID, IfName: node.IfName}
}
